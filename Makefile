# make run      trains on the default text (two minutes), then writes a sample
# make test     checks every gradient, and the programs: ends with `N passed, N failed`
# make race     searches the CUDA kernels for races, with no GPU
# make sass     what nvcc made of the CUDA kernels: registers, occupancy, instructions; with no GPU
# make bench    how fast training and generating are here
# make data/shakespeare.txt   fetches a text that everybody knows
# make compare-optimizers     all seven on it, as a table and a plot
# make mutants  plants bugs, and sees that the checker finds each (half an hour)
# make fuzz     fuzzes the file readers, for ten minutes
# make check-arm64   checks the program for another kind of processor, emulated
# make mirror LAYER=gelu   C beside CUDA; without LAYER: all of it, as a web page
# make exercise N=1   sets up an exercise, or judges your solution; without N: which there are
# make grade DIR=submissions   judges those of a class, as a table
# make clean    removes what make made, except texts and run/
# make help     lists these

CC ?= cc
CXX ?= c++
B = .build

# -O3 and the machine's own instructions. Not -ffast-math, ever: it makes NaN checks vanish. Only
# its harmless parts are asked for: fused multiply-adds; sqrt and comparisons that need not set errno
# or trap. Wide vectors are asked for since compilers prefer half of what AVX-512 machines have.
WARN = -Wall -Wextra
have = $(shell echo 'int main(void) { return 0; }' | \
         $(CC) $(1) -Werror -S -o /dev/null -x c - >/dev/null 2>&1 && echo '$(1)')
NATIVE := $(call have,-march=native)
ifeq ($(NATIVE),)
NATIVE := $(call have,-mcpu=native)
endif
ifeq ($(NATIVE),)
$(info $(CC) knows no -march=native: the programs will run, but slower than this machine could)
endif
WIDE := $(call have,-mprefer-vector-width=512)
EXCESS := $(call have,-fexcess-precision=fast)   # of machines that compute floats in double
FAST = -O3 $(NATIVE) $(WIDE) $(EXCESS) -ffp-contract=fast -fno-math-errno -fno-trapping-math
CFLAGS = -std=c11 -D_GNU_SOURCE $(FAST) $(WARN) $(EXTRA)
LIBS = -pthread -lm

# Everything is built anew when the compiler or its flags change: this file has the last ones.
FLAGS := $(shell mkdir -p $B; echo "$(CC) $(CXX) $(FAST) $(EXTRA)" >$B/new; \
           cmp -s $B/new $B/flags || mv $B/new $B/flags)$B/flags

all: train generate test_gradients

run: train generate data/tales.txt
	./train --block_size 128 --batch_size 8 --learning_rate 3e-3
	./generate --prompt "Once" --temperature 0.5

# The gradient checker is one source and five programs: in double and in float, with train.c or with
# the kernels; and with the plain matmul and attention in place of the fast ones. D is the folder of
# the sources: a student's, or a mutant's. EXTRA: more flags.
D = .
CHECKER = $D/test_gradients.c $D/train.c $(FLAGS)
HAVE_CXX := $(shell $(CXX) --version >/dev/null 2>&1 && echo yes)
GPU_CHECKERS = $(if $(HAVE_CXX),test_gradients_gpu test_gradients_gpu_float)

$D/test_gradients: $(CHECKER)
	$(CC) $(CFLAGS) -o $@ $< $(LIBS)

$D/test_gradients_float: $(CHECKER)
	$(CC) $(CFLAGS) -DREAL=float -o $@ $< $(LIBS)

$D/test_gradients_plain: $(CHECKER)
	$(CC) $(CFLAGS) -DPLAIN=1 -o $@ $< $(LIBS)

# Each command ends with a line `N passed, N failed`; .ci/tally adds them up. Kernels are run three
# times, with their threads and blocks in order and in two random orders.
STEP = $B/step.safetensors
test: train generate test_gradients test_gradients_float test_gradients_plain $(GPU_CHECKERS) $B/test_generate
	@$(if $(HAVE_CXX),,echo "no C++ compiler ($(CXX)): the kernels are not checked here")
	@./test_gradients --save $(STEP)
	@.ci/tally ./test_gradients ./test_gradients_float \
	  "./test_gradients_plain linear lm_head attention" "./test_gradients_float --against $(STEP)" \
	  $(foreach g,$(GPU_CHECKERS),./$g "GPU_SEED=1 ./$g" "GPU_SEED=2 ./$g" \
	    "./$g --against $(STEP)") $B/test_generate "SANITIZE=no .ci/generate.sh"

train: train.c $(FLAGS)
	$(CC) $(CFLAGS) -o $@ train.c $(LIBS)

generate: generate.c train.c $(FLAGS)
	$(CC) $(CFLAGS) -o $@ generate.c $(LIBS)

$B/test_generate: generate.c train.c $(FLAGS)
	$(CC) $(CFLAGS) -DTESTS -o $@ generate.c $(LIBS)

# The GPU. train_gpu is built for the GPU in this machine; if there is none, for all since Turing
# (2018). make train_gpu ARCH=sm_90 says which.
NVCC := $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc))
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | grep '^GPU' | head -n 1)
ARCH = $(if $(HAS_GPU),native,all-major)
NVCCFLAGS = -std=c++17 -O3 -arch=$(ARCH) -Xcompiler -Wall,-Wextra,-pthread -I$D

train_gpu: train_gpu.cu train.c $(FLAGS)
	$(if $(NVCC),$(NVCC) $(NVCCFLAGS) -o $@ $<,\
	  @echo "no nvcc here, so no train_gpu: ./train does the same on the CPU")

# The checker with the kernels: on the GPU where nvcc and a GPU are, else on the emulator in
# test_gradients.c. One line of sed is all that it needs: kernel<<<grid, block, 0, stream>>>(x)
# becomes LAUNCH(kernel, grid, block, 0, stream)(x), so <<< and >>> must stand on one line. It runs
# CUDA blocks of 2 warps in double, of 8 in float.
ON_GPU = $(and $(NVCC),$(HAS_GPU))
HEADER = $(if $(filter .,$D),$B,$D)/train_gpu.h
EMULATE = $(CXX) -x c++ -std=c++17 -g $(NATIVE) $(WARN) -DGPU '-DKERNELS="$(HEADER)"' -I. -I$D \
  $(EXTRA)
ALIGNED = -fsanitize=alignment -fsanitize-undefined-trap-on-error   # as a GPU does: it traps
GPU_CHECK = $(if $(ON_GPU),$(NVCC) $(NVCCFLAGS) -x cu '-DKERNELS="train_gpu.cu"' $(EXTRA),$(EMULATE) -O2 $(ALIGNED))

$(HEADER): $D/train_gpu.cu
	@mkdir -p $(@D)
	(echo '#line 1 "train_gpu.cu"'; \
	 sed 's/\([A-Za-z0-9_]*\)<<<\(.*\)>>>/LAUNCH(\1, \2)/' $<) >$@

$D/test_gradients_gpu: $(CHECKER) $(HEADER)
	$(GPU_CHECK) $(if $(ON_GPU),,-DWARPS=2) -o $@ $< -lpthread -lm

$D/test_gradients_gpu_float: $(CHECKER) $(HEADER)
	$(GPU_CHECK) -DREAL=float -o $@ $< -lpthread -lm

# Searches the kernels for races: every layer, and some updates, with the thread sanitizer told who
# waits for whom. A missing barrier is reported with kernel and line.
# make -B race SANITIZE=address,undefined finds reads and writes outside of arrays.
SANITIZE = thread
race: $(if $(HAVE_CXX),test_gradients_race,no_cxx)
	TSAN_OPTIONS=halt_on_error=1 ASAN_OPTIONS=detect_leaks=0 ./test_gradients_race

$D/test_gradients_race: $(CHECKER) $(HEADER)
	$(EMULATE) -O1 -fsanitize=$(SANITIZE) -DWARPS=2 -DSEARCH_FOR_RACES=1 -o $@ $< -lpthread -lm

# The exercises' checker: watches each access that a kernel makes. Its functions take the place of
# the thread sanitizer's, so it is compiled with the sanitizer and linked without.
$D/test_gradients_watch: $(CHECKER) $(HEADER) .ci/watch.h
	$(EMULATE) -O0 -fsanitize=thread -DWARPS=6 '-DWATCH=".ci/watch.h"' -c -o $@.o $<
	$(CXX) -o $@ $@.o -lpthread -lm -ldl

no_cxx:
	@echo "the emulator needs a C++ compiler, and there is none ($(CXX)): name one with CXX="; exit 1

# The checker on another kind of machine, which qemu-user emulates: with NEON, and weaker ordering
# of memory. In Debian: apt install qemu-user g++-aarch64-linux-gnu
ARM = $B/arm64
check-arm64:
	@mkdir -p $(ARM) && cp train.c train_gpu.cu test_gradients.c $(ARM)
	$(MAKE) D=$(ARM) B=$(ARM)/build NVCC= CC=aarch64-linux-gnu-gcc CXX=aarch64-linux-gnu-g++ \
	  EXTRA=-static $(addprefix $(ARM)/,test_gradients test_gradients_float test_gradients_gpu)
	@.ci/tally "qemu-aarch64 $(ARM)/test_gradients" "qemu-aarch64 $(ARM)/test_gradients_float" \
	  "qemu-aarch64 $(ARM)/test_gradients_gpu"

# What the kernels compile to, for each generation of GPUs. Needs nvcc, cuobjdump and python3.
sass:
	$(if $(NVCC),python3 .ci/sass.py $(NVCC) -std=c++17 -O3 -I$D,\
	  @echo "make sass needs nvcc, from the CUDA toolkit, and there is none"; exit 1)

# Plants bugs, one at a time, and sees whether the checker finds each.
mutants:
	@mkdir -p $B; echo "== train_gpu.cu test_gradients_race" >$B/barriers
	@sed -n '/^ *__syncthreads();/=' train_gpu.cu | sed 's/.*/gpu: no barrier in line & | &s@__syncthreads();@@/' >>$B/barriers
	@.ci/mutants .ci/bugs .ci/bugs_gpu $B/barriers

# Fuzzes the file readers. Needs clang.
SECONDS_OF_FUZZING = 600
fuzz: train data/tales.txt
	@.ci/fuzz $(SECONDS_OF_FUZZING)

data/tales: data/tales.c
	$(CC) -std=c11 -O2 $(WARN) -o $@ data/tales.c -lm

data/tales.txt: data/tales
	data/tales $@

# The classic, for those online. The download is not trusted: its SHA-256 is checked.
SHAKESPEARE ?= https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
SHA256 = 86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed
data/shakespeare.txt:
	@echo "fetching $(SHAKESPEARE)"
	@{ curl -fsSL -o $@.tmp "$(SHAKESPEARE)" || wget -qO $@.tmp "$(SHAKESPEARE)"; } || { rm -f $@.tmp; \
	  echo "$@ could not be fetched: if this machine is offline, copy the file here from one that is" \
	       "not, or train on data/tales.txt (make run), or on any text: ./train TEXT"; exit 1; }
	@sum=`{ sha256sum $@.tmp || shasum -a 256 $@.tmp; } 2>/dev/null | cut -d ' ' -f 1`; \
	if [ "$$sum" = "$(SHA256)" ]; then mv $@.tmp $@; else rm -f $@.tmp; \
	  echo "what came is not tiny Shakespeare: its SHA-256 is $$sum, expected $(SHA256)"; exit 1; fi

# The README's picture: single-step against accumulated updates.
data/compare.svg: data/shakespeare.txt train
	@mkdir -p run
	./train $< --compare 4 --max_steps 1000 --out run/compare
	cp run/compare/loss.svg $@

# Every optimizer at its own default rate: a table, and this picture.
compare-optimizers: data/shakespeare.txt train
	@.ci/optimizers $< data/optimizers.svg

# Step time, tokens/s, GFLOP/s and the share of the machine's peak for four sizes of model; with
# PEER=python3 the same in PyTorch, if that python has it. Then tokens/s of generate, and how near
# that is to reading the weights and doing nothing else.
bench: train generate data/tales.txt
	@CC='$(CC)' BENCH_FLAGS='$(FAST)' PEER=$(PEER) .ci/bench
	@./generate --bench
	@if [ -f run/config.json ]; then ./generate --bench run; fi

# Exercise N of .ci/exercises, in .exercise/N: sets it up, then judges what is there.
exercise:
	@CXX="$(CXX)" HINT="$(HINT)" .ci/exercise "$(N)" || true

# Judges all of DIR/NAME/N/train.c and DIR/NAME/N/train_gpu.cu: a table.
grade:
	@CXX="$(CXX)" .ci/grade "$(DIR)"

# C beside CUDA: make mirror LAYER=layernorm in the terminal, make mirror as one web page.
mirror: test_gradients
	@.ci/mirror $(LAYER)

clean:
	rm -rf $B train train_gpu generate test_gradients test_gradients_float \
	  test_gradients_plain test_gradients_gpu test_gradients_gpu_float test_gradients_race \
	  test_gradients_watch test_gradients_watch.o data/tales

help:
	@sed -n '1,/^$$/s/^# \(make .*\)/\1/p' Makefile

.PHONY: all run test race no_cxx check-arm64 sass mutants fuzz compare-optimizers bench exercise grade mirror clean help
