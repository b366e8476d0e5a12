# make run      trains on the default text (two minutes), then writes a sample
# make test     checks every gradient, and the programs: ends with `N passed, N failed`
# make race     searches the CUDA kernels for races, with no GPU
# make bench    how fast training and generating are here
# make data/shakespeare.txt   fetches a text that everybody knows
# make exercise N=1   sets up an exercise, or judges your solution; without N: which there are
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

# Kernels are checked where there is a C++ compiler.
KERNELS_TOO := $(shell $(CXX) --version >/dev/null 2>&1 && echo test_gradients_gpu)

# Once more those that share memory, their threads and blocks in random orders.
ANY_ORDER = ./$(KERNELS_TOO) embedding layernorm linear attention crossentropy

# Each part ends with a line `N passed, N failed`; .ci/tally adds them up.
test: train generate test_gradients $(KERNELS_TOO) $B/test_generate
	@$(if $(KERNELS_TOO),,echo "no C++ compiler ($(CXX)): the kernels are not checked here")
	@.ci/tally ./test_gradients $(addprefix ./,$(KERNELS_TOO)) \
	  $(if $(KERNELS_TOO),"GPU_SEED=1 $(ANY_ORDER)" "GPU_SEED=2 $(ANY_ORDER)") \
	  $B/test_generate "SANITIZE=no .ci/generate.sh"

train: train.c
	$(CC) $(CFLAGS) -o $@ train.c $(LIBS)

generate: generate.c train.c
	$(CC) $(CFLAGS) -o $@ generate.c $(LIBS)

$B/test_generate: generate.c train.c
	@mkdir -p $B
	$(CC) $(CFLAGS) -DTESTS -o $@ generate.c $(LIBS)

# The gradient checker is one source compiled twice: in double, with main(), and in float, lent.
# SOURCES and OUT: other people's, a student's or a mutant's.
SOURCES = .
OUT = test_gradients
OBJECTS = $(if $(filter .,$(SOURCES)),$B,$(SOURCES))

$(filter-out %_race %_gpu,$(OUT)): $(OBJECTS)/double.o $(OBJECTS)/c_float.o
	$(CC) -o $@ $^ $(LIBS)

$(OBJECTS)/double.o: $(SOURCES)/test_gradients.c $(SOURCES)/train.c
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -c -o $@ $<

$(OBJECTS)/c_float.o: $(SOURCES)/test_gradients.c $(SOURCES)/train.c
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -DLEND=c_float -DREAL=float -c -o $@ $<

# The GPU. train_gpu is built for the GPU in this machine; if there is none, for all since Turing
# (2018). make train_gpu ARCH=sm_90 says which.
NVCC := $(firstword $(shell command -v nvcc 2>/dev/null) $(wildcard /usr/local/cuda/bin/nvcc))
HAS_GPU := $(shell nvidia-smi -L 2>/dev/null | head -n 1)
ARCH = $(if $(HAS_GPU),native,all-major)
NVCCFLAGS = -std=c++17 -O3 -arch=$(ARCH) -Xcompiler -Wall,-Wextra,-pthread -I.

train_gpu: train_gpu.cu train.c
	$(if $(NVCC),$(NVCC) $(NVCCFLAGS) -o $@ $<,\
	  @echo "no nvcc here, so no train_gpu: ./train does the same on the CPU")

# The gradient checker again: the kernels in double and in float, beside train.c in double. Where
# nvcc and a GPU are, there; else on the emulator in test_gradients.c. One line of sed is all that it
# asks for: kernel<<<grid, block, 0, stream>>>(x) becomes LAUNCH(kernel, grid, block, 0, stream)(x).
# The emulator runs blocks of 2 warps in double, which is quicker, and of 8 in float.
ON_GPU = $(and $(NVCC),$(HAS_GPU))
KERNELS = $(if $(ON_GPU),train_gpu.cu,$(OBJECTS)/train_gpu.h)
GPUXX = $(if $(ON_GPU),$(NVCC) $(NVCCFLAGS) -x cu,$(CXX) -x c++ -std=c++17 -O2 $(NATIVE) -g $(WARN) -I.)
GPUFLAGS = '-DKERNELS="$(KERNELS)"' -DGPU $(EXTRA)

$(OBJECTS)/train_gpu.h: $(SOURCES)/train_gpu.cu
	@mkdir -p $(@D)
	(echo '#line 1 "train_gpu.cu"'; \
	 sed 's/\([A-Za-z0-9_]*\)<<<\(.*\)>>>/LAUNCH(\1, \2)/' $<) >$@

GPU_OUT = $(if $(filter %_gpu,$(OUT)),$(OUT),test_gradients_gpu)
$(GPU_OUT): $(OBJECTS)/gpu_double.o $(OBJECTS)/gpu_float.o $B/c_double.o
	$(if $(ON_GPU),$(NVCC) -arch=$(ARCH),$(CXX)) -o $@ $^ -lpthread -lm

$(OBJECTS)/gpu_double.o: $(SOURCES)/test_gradients.c $(OBJECTS)/train_gpu.h $(SOURCES)/train.c
	$(GPUXX) $(GPUFLAGS) $(if $(ON_GPU),,-DWARPS=2) -c -o $@ $<

$(OBJECTS)/gpu_float.o: $(SOURCES)/test_gradients.c $(OBJECTS)/train_gpu.h $(SOURCES)/train.c
	$(GPUXX) $(GPUFLAGS) -DLEND=gpu_float -DREAL=float -c -o $@ $<

$B/c_double.o: test_gradients.c train.c
	@mkdir -p $(@D)
	$(CC) $(CFLAGS) -DLEND=c_double -c -o $@ $<

# Searches the kernels for races: every layer once, and some updates, with the thread sanitizer
# told who waits for whom. A barrier that is missing is reported with kernel and line.
# make -B race SANITIZE=address,undefined finds what is read or written outside of its array.
SANITIZE = thread
race: test_gradients_race
	TSAN_OPTIONS=halt_on_error=1 ASAN_OPTIONS=detect_leaks=0 ./test_gradients_race

RACE_OUT = $(if $(filter %_race,$(OUT)),$(OUT),test_gradients_race)
$(RACE_OUT): $(OBJECTS)/race.o $B/$(if $(ON_GPU),race,gpu)_float.o $B/c_double.o
	$(CXX) -fsanitize=$(SANITIZE) -o $@ $^ $(LIBS)

$B/race_float.o: test_gradients.c $B/train_gpu.h train.c   # emulated where gpu_float.o is not
	$(CXX) -x c++ -std=c++17 -O2 -g $(WARN) -I. '-DKERNELS="$B/train_gpu.h"' -DGPU \
	  -DLEND=gpu_float -DREAL=float -c -o $@ $<

$(OBJECTS)/race.o: $(SOURCES)/test_gradients.c $(OBJECTS)/train_gpu.h $(SOURCES)/train.c
	$(CXX) -x c++ -std=c++17 -O1 -g -fsanitize=$(SANITIZE) $(WARN) -I. '-DKERNELS="$(OBJECTS)/train_gpu.h"' \
	  -DGPU -DWARPS=2 -DMOVE_EACH=0 $(EXTRA) -c -o $@ $<

# Plants bugs, one at a time, and sees whether the checker finds each.
mutants:
	@mkdir -p $B; echo "== train_gpu.cu test_gradients_race" >$B/barriers
	@sed -n '/^ *__syncthreads();/=' train_gpu.cu | sed 's/.*/gpu: no barrier in line & | &s@__syncthreads();@@/' >>$B/barriers
	@.ci/mutants .ci/bugs .ci/bugs_gpu $B/barriers

data/tales: data/tales.c
	$(CC) -std=c11 -O2 $(WARN) -o $@ data/tales.c -lm

data/tales.txt: data/tales
	data/tales $@

# The classic, for those online. Whoever fetched it is not trusted: its SHA-256 is.
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

# Step time, tokens/s and GFLOP/s of three sizes of model: the median of the steps of a run. Then
# tokens/s of generate, and how near that is to reading the weights and doing nothing else.
bench: train generate data/tales.txt
	@.ci/bench
	@./generate --bench
	@if [ -f run/config.json ]; then ./generate --bench run; fi

# Exercise N of .ci/exercises, in .build/exercise-N: sets it up, then judges what is there.
exercise:
	@.ci/exercise "$(N)"

clean:
	rm -rf $B train train_gpu generate test_gradients test_gradients_gpu test_gradients_race data/tales

help:
	@sed -n 's/^# \(make .*\)/\1/p' Makefile

.PHONY: all run test race mutants bench exercise clean help
