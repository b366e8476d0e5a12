#!/bin/sh
# exercise.sh [N...]: proves the exercises (those named) and their judge. As it is set up, an exercise
# is not solved; the project's source solves it, or the answer in .ci/answers (rot13, one block each:
# `== N`, then the lines in place of `// yours`, or `sed EXPRESSION`); a typical wrong solution fails
# with the message that it should have; attempts to fool the judge fail. Works in a copy. Ends with
# `N passed, N failed`.
top=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
if [ $# -eq 0 ]; then                    # all: in two halves at the same time
  numbers=$(sed -n 's/^== \([0-9]*\) .*/\1/p' "$top/.ci/exercises")
  half() { echo "'$0'" $(echo "$numbers" | awk "\$1 $1"); }
  "$top/.ci/tally" -p "$(half '<= 15')" "$(half '> 15')"
  exit
fi
mkdir "$work/project" && cd "$top" &&
  cp -R Makefile train.c train_gpu.cu test_gradients.c .ci "$work/project" &&
  cd "$work/project" || exit 1
passed=0 failed=0
only=" $* "
asked() { [ "$only" = "  " ] || case $only in *" $1 "*) ;; *) return 1 ;; esac; }

# judge WHAT N FILE WANT: judges FILE as a solution of N. WANT: "solved", or what must be printed.
judge() {
  asked "$2" || return
  began=$(date +%s)
  .ci/exercise "$2" "$3" >"$work/log" 2>&1
  rc=$? text=$4
  if [ "$4" = solved ]; then text="exercise $2 is solved"; else rc=$((1 - rc)); fi
  if [ $rc -eq 0 ] && grep -qF -- "$text" "$work/log"; then
    echo "ok exercise $2, $1 ($(($(date +%s) - began)) s)"; passed=$((passed + 1))
  else
    echo "FAIL exercise $2, $1: expected: $4"; tail -n 12 "$work/log" | sed 's/^/  /'
    failed=$((failed + 1))
  fi
}

# ---- Every exercise, as it is set up, and solved
for n in $(sed -n 's/^== \([0-9]*\) .*/\1/p' .ci/exercises); do
  asked "$n" || continue
  judge "as it is set up" "$n" "" "exercise $n is not solved yet"
  file=$(ls .exercise/"$n")
  tr 'A-Za-z' 'N-ZA-Mn-za-m' <.ci/answers | awk -v n="$n" '
    $1 == "==" { on = $2 == n; next } on' >"$work/answer"
  if grep -q '^sed ' "$work/answer"; then
    sed "$(sed -n 's/^sed //p' "$work/answer")" ".exercise/$n/$file" >"$work/solved.$n"
  elif [ -s "$work/answer" ]; then
    awk -v answer="$work/answer" '
      /^  \/\/ yours$/ { while ((getline line <answer) > 0) print line; next } { print }' \
      ".exercise/$n/$file" >"$work/solved.$n"
  else cp "$file" "$work/solved.$n"; fi
  judge "solved" "$n" "$work/solved.$n" solved
done

# ---- Typical wrong solutions: wrong N WANT EXPRESSION, which sed applies to the right one
wrong() {
  asked "$1" || return
  sed "$3" "$work/solved.$1" >"$work/wrong"
  if cmp -s "$work/wrong" "$work/solved.$1"; then
    echo "FAIL exercise $1: $3 changes nothing"; failed=$((failed + 1))
  else judge "$3" "$1" "$work/wrong" "$2"; fi
}
wrong 1 'the part of du/dx that comes from x^3, with the factor 0.333333' '/^static void gelu_backward/,/^}/ s/3 \* GELU_B/GELU_B/'
wrong 1 'the factor dout is missing' '/^static void gelu_backward/,/^}/ s/= dy_n.c. \*/=/'
wrong 1 'not 0, for x -10.54, dout 1.5138' '/^static void gelu_backward/,/^}/ s/(1 - h\*h)/(1 - h)/'
wrong 2 'set (=) where it must be added (+=)' '/^static void linear_backward/,/^}/ s/N, ADD/N, SET/'
wrong 3 "only the target's element of a row" '/^static void crossentropy_backward/,/^}/ s/dlogits_n.target.n.. -= dloss;//'
wrong 2 'right, but transposed' '/^static void linear_backward/,/^}/ {
  s/transpose(rows_of(x.data, C)), dy, C, O/transpose(dy), rows_of(x.data, C), O, C/
  s/p.weight.grad, O/p.weight.grad, C/; }'
wrong 7 'these are the numbers of layernorm d weight' '/^static void layernorm_backward/,/^}/ {
  s/p.bias.grad, out/p.weight.grad, out/; s/p.weight.grad.c + j/p.bias.grad[c + j/; }'
wrong 7 'each row is off by a factor of its own, 94.2419 to 94.3502' '/^static void layernorm_backward/,/^}/ s/+= rstd \* (dout/+= (dout/'
wrong 8 'only the K and V columns: right numbers in the wrong place: column 24 has those of column 48' \
  '/^static void attention_backward/,/^}/ { s/g\.v + (j/g.X + (j/; s/g\.k + (j/g.v + (j/; s/g\.X/g.k/; }'
wrong 7 "each row is off by a constant of its own" '/^static void layernorm_backward/,/^}/ s/ - avg_g - / - /'
wrong 9 'x[764], but it has 504 numbers, 0 to 503' '/fill_kernel(real/,/^}/ s/n - i/4/'
wrong 10 'out[764], but it has 504 numbers, 0 to 503' '/residual_forward_kernel(real/,/^}/ s/store4(out + i, n - i/store4(out + i, 4/'
wrong 12 'reads token[21], but it has 21 numbers' '/embedding_forward_kernel(real/,/^}/ s/if (n >= N) return;//'
wrong 12 'do all of its lanes take part in each?' '/embedding_forward_kernel(real/,/^}/ s/int c = threadIdx.x % 32; c < C; c += 32/int c = threadIdx.x % 32 ? C : 0; c < C; c++/'
wrong 9 'off by the factor 0.16' '/fill_kernel(real/,/^}/ s/{{value, value, value, value}}/{{6, 6, 6, 6}}/'
wrong 13 'the first failure: layernorm out' '/layernorm_forward_kernel(real/,/^}/ s/warp_sum(sum)/sum/'
wrong 15 'and between the two no __syncthreads() is passed' '/double block_sum(/,/^}/ s/__syncthreads();//'
wrong 15 '`in_hook` is not for a solution' '/double block_sum(/,/^}/ s/__shared__ double/in_hook = true; &/'
wrong 15 '`counts_traffic` is a name of the emulator' '/double block_sum(/,/^}/ s/__shared__ double/counts_traffic = false; &/'
wrong 16 'a race for shared memory' '/void store_column(/,/^}/ s/__syncthreads();//'
wrong 16 'add_columns_kernel waits for banks of shared memory: it takes 2.0 times as long' '/void store_column(/,/^}/ {
  s/\[WARPS\]\[32\]/[32][WARPS]/; s/sums\[threadIdx.x . 32\]\[threadIdx.x % 32\]/sums[threadIdx.x % 32][threadIdx.x \/ 32]/
  s/sums\[i\]\[threadIdx.x\]/sums[threadIdx.x][i]/; }'
wrong 15 solved '/double block_sum(/,/^}/ {
  s/__shfl_xor_sync(ALL_LANES, x, i)/__shfl_down_sync(ALL_LANES, x, i, 32)/; }'
wrong 15 'no __syncthreads() is passed' '/double block_sum(/,/^}/ s/__syncthreads();/__syncwarp();/'
wrong 15 'pass ALL_LANES' '/double block_sum(/,/^}/ s/ALL_LANES/0xffff/'
wrong 15 'atomic additions come in any order' '/double block_sum(/,/^}/ s/__syncthreads();/&  atomicAdd(part, x);/'
wrong 17 'a thread waits for one that never arrives' '/crossentropy_forward_kernel(/,/^}/ s/sum = (real)block_sum/if (threadIdx.x >= 40) return; &/'
wrong 17 'has returned' '/crossentropy_forward_kernel(/,/^}/ s/sum = (real)block_sum/if (threadIdx.x > 0) return; &/'
wrong 21 'nothing orders the blocks of a launch' '/void embedding_backward_token(/,/^}/ s/if (count > 0 && list\[0\] < n) return;//'
wrong 22 'and between the two no __syncthreads() is passed' '/  *__syncthreads(); *.. and read/d'
wrong 22 ', but it has 504 numbers' 's/i < M && k + column < K ?/k + column < K ?/'
wrong 22 'matmul_tiled waits for banks of shared memory: it takes 1.5 times as long' '/matmul_tiled(Matrix/,/^}/ {
  s/b_tile\[row\]\[column\]/b_tile[column][row]/; s/b_tile\[l\]\[column\]/b_tile[column][l]/; }'
wrong 24 'the first failure: attention out' 's/o\[e\] \* rescale/o[e]/'
wrong 25 'returned, and was at no barrier' '/matmul_tensor(Matrix/,/^}/ s/  real sum.4.*/&  if (i0 + g >= M) return;/'
wrong 25 'column 1 has those of column 2, and a constant' 's/j = j0 + 2\*t + e % 2;/j = j0 + t + e % 2 * 4;/'
wrong 27 '4.0 passes for an access of a warp, where 1.0 would do' '/ int swizzled(/,/^}/ s/(c ^ .*);/c;/'
wrong 28 'the first failure: attention out' '/attention_forward_tile(const/,/^}/ s/- j + 1/- j/'

# ---- Attempts to fool the judge: fool WHAT WANT BODY, for gelu_backward
fool() {
  printf '%s\n' "$3" >"$work/body"
  awk -v body="$work/body" '
    /^static void gelu_backward\(/ { print; while ((getline line <body) > 0) print line; on = 1 }
    !on { print }
    /^}/ { if (on) print; on = 0 }' train.c >"$work/fool.c"
  judge "$1" 1 "$work/fool.c" "$2"
}
forged='printf("10 passed, 0 failed\nsigned 0123456789abcdef\n"); fflush(stdout);'
fool "exit(0)" '`exit` is not for a solution' '  exit(0);'
fool "a forged verdict, then _exit(0)" '`_exit` is not for a solution' "  $forged _exit(0);"
fool "a pointer to _exit" '`_exit` is not' '  void (*f)(int) = _exit; f(0);'
fool "atexit" '`atexit` is not' '  atexit((void (*)(void))0);'
fool "abort() of the compiler" '`__builtin_trap` is not' '  __builtin_trap();'
fool "asm" '`__asm__` is not' '  __asm__("hlt");'
fool "a macro" 'preprocessor directives are not judged' '#define fabs(x) 0'
fool "a file that is included" 'preprocessor directives are not judged' '#include "/etc/passwd"'
fool "_Pragma" '`_Pragma` is not' '  _Pragma("GCC optimize 0")'
fool "a digraph for #" 'preprocessor directives are not judged' '  %:define fabs(x) 0'
fool "a word split in two lines" 'a line that ends in a backslash' '  ex\
it(0);'
fool "a word behind // in a string" '`exit` is not' '  printf("//"); exit(0);'
fool "a word behind a quote in a character" '`exit` is not' "  char c = '\"'; exit(c); c = '\"';"
fool "a function of its own, run before main" 'this } closes the function' '  }
  __attribute__((constructor)) static void early(void) { _exit(0);'
fool "an open comment" 'with an open comment' '  /* the rest is not compiled'
fool "a function that opens other files" '`fopen` is not' '  fclose(fopen("test_gradients.c", "w"));'
fool "reading the judge's word" '`getchar` is not' '  getchar();'
fool "reading it without a lock" '`getchar_unlocked` is not' '  getchar_unlocked();'
fool "ending with errx()" '`errx` is not' '  errx(0, "");'
fool "the checker's counts changed" '`opt` is not' '  int *f = (int *)((char *)&opt - 0x3620); f[0]--;'
fool "a program" '`system` is not' '  system("true");'
fool "sleeping, which takes no CPU time" 'it calls sleep: a solution computes' '  sleep(100000);'
fool "reading the judge's word by another function" 'it calls readv' '  long v[2]; readv(0, v, 1);'
fool "output without end" 'it prints without end' '  for (;;) puts("x");'
SECONDS_ALLOWED=3 fool "a loop without end" 'does a loop not end?' '  for (volatile int i = 0; ; ) i = 0;'
fool "all memory" 'exercise 1 is not solved yet' '  for (;;) memset(malloc(1 << 30), 1, 1 << 30);'
fool "ending the program with die()" 'the program ended here' '  die("10 passed");'
fool "a forged verdict, then a crash" 'expected: the verdict of the checker' "  $forged *(volatile int *)0 = 0;"
awk '/^static void gelu_backward\(/ { print; on = 1 } !on { print } /^}/ { if (on) print; on = 0 }' \
  train.c >"$work/elsewhere.c"
echo '__attribute__((constructor)) static void early(void) { _exit(0); }' >>"$work/elsewhere.c"
judge "a constructor elsewhere in the file: not looked at" 1 "$work/elsewhere.c" 'NaN: never written'
: >"$work/empty.c"
judge "an empty file" 1 "$work/empty.c" 'there is no function gelu_backward()'

# The same with no word forbidden: the judge's word alone must be enough.
sed 's/if (word in forbidden.*/if (0)/' .ci/bodies.awk >"$work/awk" && cp "$work/awk" .ci/bodies.awk
fool "not forbidden: exit(0)" 'expected: the verdict of the checker' '  exit(0);'
fool "not forbidden: a forged verdict, then _exit(0)" 'expected: the verdict of the checker' \
  "  $forged _exit(0);"
fool "not forbidden: _exit(0) without a word" 'expected: the verdict of the checker' '  _exit(0);'
echo "$passed passed, $failed failed"
[ "$failed" -eq 0 ]
