# make run      trains on the default text (two minutes), then writes a sample
# make test     checks every gradient, and the programs: ends with `N passed, N failed`
# make help     lists the rest

CC ?= cc
CXX ?= c++
B = .build

# -O3 and the machine's own instructions. Not -ffast-math, ever: it makes NaN checks vanish. What it
# is good for is asked for alone: fused multiply-adds; sqrt and comparisons that need not set errno
# or trap. Wide vectors are asked for since compilers prefer half of what AVX-512 machines have.
WARN = -Wall -Wextra
have = $(shell echo 'int main(void){return 0;}' >/tmp/flag_$$$$.c; \
         $(CC) $(1) -Werror -o /tmp/flag_$$$$ /tmp/flag_$$$$.c >/dev/null 2>&1 && echo '$(1)'; \
         rm -f /tmp/flag_$$$$ /tmp/flag_$$$$.c)
NATIVE := $(call have,-march=native)
ifeq ($(NATIVE),)
NATIVE := $(call have,-mcpu=native)
endif
ifeq ($(NATIVE),)
$(info $(CC) knows no -march=native: the programs will run, but slower than this machine could)
endif
WIDE := $(call have,-mprefer-vector-width=512)
FAST = -O3 $(NATIVE) $(WIDE) -ffp-contract=fast -fno-math-errno -fno-trapping-math
CFLAGS = -std=c11 -D_GNU_SOURCE $(FAST) $(WARN) $(EXTRA)
LIBS = -pthread -lm

all: train

train: train.c
	$(CC) $(CFLAGS) -o $@ train.c $(LIBS)

.PHONY: all
