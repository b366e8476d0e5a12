# make run      trains on the default text (two minutes), then writes a sample
# make test     checks every gradient, and the programs: ends with `N passed, N failed`
# make bench    how fast training and generating are here
# make data/shakespeare.txt   fetches a text that everybody knows
# make clean    removes what make made, except texts and run/
# make help     lists these

CC ?= cc
CXX ?= c++
B = .build

# -O3 and the machine's own instructions. Not -ffast-math, ever: it makes NaN checks vanish. What it
# is good for is asked for alone: fused multiply-adds; sqrt and comparisons that need not set errno
# or trap. Wide vectors are asked for since compilers prefer half of what AVX-512 machines have.
WARN = -Wall -Wextra
have = $(shell mkdir -p $B; echo 'int main(void) { return 0; }' >$B/flag.c; \
         $(CC) $(1) -Werror -o $B/flag $B/flag.c >/dev/null 2>&1 && echo '$(1)')
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

all: train generate test_gradients

run: train generate data/tales.txt
	./train
	./generate --prompt "Once"

# Each part ends with a line `N passed, N failed`; .ci/tally adds them up.
test: train generate test_gradients
	@.ci/tally ./test_gradients

train: train.c
	$(CC) $(CFLAGS) -o $@ train.c $(LIBS)

data/tales: data/tales.c
	$(CC) -std=c11 -O2 $(WARN) -o $@ data/tales.c -lm

data/tales.txt: data/tales
	data/tales $@

# The classic, for those online. Whoever fetched it is not trusted: its SHA-256 is.
SHAKESPEARE = https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
SHA256 = 86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed
data/shakespeare.txt:
	@echo "fetching $(SHAKESPEARE)"
	@{ curl -fsSL -o $@.tmp "$(SHAKESPEARE)" || wget -qO $@.tmp "$(SHAKESPEARE)"; } || { rm -f $@.tmp; \
	  echo "$@ could not be fetched: if this machine is offline, copy the file here from one that is" \
	       "not, or train on data/tales.txt (make run), or on any text: ./train TEXT"; exit 1; }
	@sum=`{ sha256sum $@.tmp || shasum -a 256 $@.tmp; } 2>/dev/null | cut -d ' ' -f 1`; \
	if [ "$$sum" = "$(SHA256)" ]; then mv $@.tmp $@; else rm -f $@.tmp; \
	  echo "what came is not tiny Shakespeare: its SHA-256 is $$sum, expected $(SHA256)"; exit 1; fi

# Step time, tokens/s and GFLOP/s of three sizes of model: the median of the steps of a run.
bench: train data/tales.txt
	@.ci/bench

clean:
	rm -rf $B train train_gpu generate test_gradients test_gradients_gpu data/tales

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

.PHONY: all run test bench clean help
