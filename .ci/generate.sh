#!/bin/sh
# Checks the whole program: what it prints, whatever the prompt, the options and the folder are.
#   sh .ci/generate.sh [GENERATE] [TRAIN]     ./generate and ./train if not given
# CC (cc) builds the version with sanitizers; SANITIZE=no leaves it out. Run from the root.

export LC_ALL=C ASAN_OPTIONS=detect_leaks=0
here=$(pwd)
absolute() { case $1 in /*) echo "$1" ;; *) echo "$here/$1" ;; esac; }
generate=$(absolute "${1:-./generate}")
train=$(absolute "${2:-./train}")
CC=${CC:-cc}
for program in "$generate" "$train"; do
  [ -x "$program" ] || { echo "no program $program: build it first"; exit 1; }
done
tmp=$(mktemp -d) && cd "$tmp" || exit 1
trap 'rm -rf "$tmp"' EXIT
trap 'exit 130' INT TERM

passed=0 failed=0
check() {   # NAME COMMAND: passes if the command succeeds; what it printed is shown if it fails
  name=$1; shift
  if "$@" >report 2>&1; then echo "ok $name"; passed=$((passed + 1))
  else echo "FAIL $name"; sed 's/^/     /' report | head -20; failed=$((failed + 1)); fi
}

if [ "${SANITIZE:-yes}" = yes ]; then   # built while the first checks run
  $CC -std=c11 -D_GNU_SOURCE -g -O1 -fsanitize=address,undefined -fno-sanitize-recover=all \
    -o asan "$here/generate.c" -pthread -lm >asan.log 2>&1 &
fi

# A model with a context of 16 that has seen a little English and Chinese
i=0
while [ $i -lt 60 ]; do
  echo "Once there was a cat, number $i. 从前有一只猫,它很懒。"
  i=$((i + 1))
done >text
"$train" text --n_layer 2 --n_head 2 --n_embd 16 --block_size 16 --batch_size 8 --max_steps 300 \
  --learning_rate 1e-2 --eval_interval 0 --threads 2 --out run >/dev/null || exit 1
go() { "$generate" run "$@"; }
shows() {   # TEXT COMMAND: the command succeeds, and TEXT is in what it prints
  text=$1; shift
  "$@" >shown 2>&1 || { cat shown; return 1; }
  grep -q -e "$text" shown || { echo "expected $text in:"; cat shown; return 1; }
}
refuses() {   # TEXT COMMAND: it ends with code 1, and a single line that has TEXT in it
  text=$1; shift
  "$@" >shown 2>&1; code=$?
  [ $code = 1 ] && [ "$(grep -c . shown)" = 1 ] && grep -q -e "$text" shown && return
  echo "exit code $code, expected 1 and $text in:"; cat shown; return 1
}

# ---- Text

same_on_threads() {
  for n in 1 2 5; do go --threads $n --prompt Once "$@" >out.$n 2>/dev/null || return 1; done
  cmp out.1 out.2 && cmp out.1 out.5
}
check "the same text on 1, 2 and 5 threads: drawn" same_on_threads --temperature 1.2 --top_p 0.95
check "the same text on 1, 2 and 5 threads: 7 samples" same_on_threads --samples 7
check "the same text on 1, 2 and 5 threads: beam search" same_on_threads --beam 5
check "the same text on 1, 2 and 5 threads: --explain" same_on_threads --explain --tokens 40

first_of_many() {   # the first of many is the one that is written alone
  go --tokens 100 >one && go --tokens 100 --samples 5 >five || return 1
  sed '1d; /^--- 2 of 5/,$d' five | cmp - one
}
check "the first sample of 5 is the only one of 1" first_of_many 2>/dev/null
seeds() {
  go --seed 1 >a && go --seed 1 >b && go --seed 2 >c && cmp a b && ! cmp -s a c
}
check "a seed gives its text again, another another" seeds
greedy_is() { go --greedy >a && go "$@" >b && cmp a b; }
check "--beam 1 is greedy" greedy_is --beam 1
check "--temperature 0 is greedy" greedy_is --temperature 0
check "--top_k 1 is greedy" greedy_is --top_k 1
check "--top_p 0 is greedy" greedy_is --top_p 0

# Reads all; fails if it is not UTF-8, where iconv is there to tell
utf8() { if command -v iconv >/dev/null; then iconv -f UTF-8 -t UTF-8; else cat; fi >/dev/null; }
whole_characters() {   # what is printed is UTF-8, whatever is drawn
  for seed in 1 2 3 4 5; do
    go --prompt "从前有" --seed $seed --temperature 1.5 --tokens 300 | utf8 || return 1
  done
  go --prompt "从前有" --explain --samples 2 --tokens 5 | utf8 &&
  go --prompt "从前有" --compare --tokens 100 | utf8
}
check "what is printed is whole characters" whole_characters
prompt_is_printed() {
  [ "$(go --prompt "从前有一" --tokens 0)" = "从前有一" ] && [ "$(go --tokens 0)" = "" ] &&
  go --prompt "$(printf 'a\302\233b')" --tokens 0 >control && ! grep "$(printf '\302\233')" control
}
check "a prompt begins the text; the line break in its place does not" prompt_is_printed
cut_prompt() { go --prompt "$(printf '\344\273')" --tokens 30 | utf8; }
check "a prompt that ends inside a character" cut_prompt
check "learned Chinese" shows "从前有一只猫" go --prompt "从前有" --greedy --tokens 60
check "a prompt longer than the context says what is used" shows "its last 15 are used" \
  go --prompt "Once there was a cat, number 1." --tokens 3

# ---- Numbers

score_is_eval() {   # one window: 17 bytes
  printf 'Once there was a ' >window
  a=$("$train" window --out run --eval | tail -1)
  b=$(go --score 'Once there was a ' | tail -1)
  [ "$a" = "$b" ] || { echo "train --eval: $a, --score: $b"; return 1; }
}
check "--score is the loss of train --eval" score_is_eval
score_is_compare() {   # ROW OPTION: text and loss of one of both, also after the window has slid
  go --prompt x --compare --beam 5 --tokens 50 >table || return 1
  loss=$(sed -n "s/^$1  *[0-9][0-9.]*  *\([0-9.]*\).*/\1/p" table)
  text=$(go --prompt x --tokens 50 $2; echo .); text=${text%??}
  scored=$(go --score "$text" | sed -n 's/^loss //p')
  awk -v a="$loss" -v b="$scored" 'BEGIN { d = a - b; exit !(a > 0 && d*d < 1e-8) }' || {
    echo "--compare: $loss, --score: $scored"; return 1; }
}
check "--score of greedy's text is its loss in --compare" score_is_compare greedy --greedy
check "--score of a beam's text is its loss in --compare" score_is_compare "beam search" "--beam 5"
check "--compare has a verdict" shows "times as likely\|equally likely" go --compare --prompt a
explained() {
  go --prompt Once --explain --greedy --tokens 30 >out || return 1
  [ "$(grep -c '%<' out)" = 30 ] || { cat out; return 1; }
}
check "--explain has a line for each byte, greedy's choice among the five" explained
attention() {
  go --attention a.svg --prompt "<Once> & 从前 $(printf '\357\277\277')" --tokens 0 && grep -q '</svg>' a.svg &&
  [ "$(grep -c 'layer [12], head [12]' a.svg)" = 4 ] || return 1
  if command -v xmllint >/dev/null; then xmllint --noout a.svg; fi
}
check "--attention draws each head" attention
attention_of_context() {   # more rows than the context has tokens, and a longer prompt
  p="Once there was a cat, and many more cats came after it, and dogs, and geese"
  go --attention 1.svg --prompt "$p" --tokens 0 && go --attention 64.svg --prompt "$p" --tokens 0 \
    --samples 64 && cmp 1.svg 64.svg
}
check "--attention looks no further back than the context" attention_of_context

# ---- What is refused

check "--help lists the options" shows "attention FILE\|--attention" "$generate" --help
check "no folder" refuses "No such file" "$generate" nowhere
check "a file for a folder" refuses "Not a directory" "$generate" text
check "two folders" refuses "unexpected argument" go run
check "an unknown option" refuses "unknown option --token;" go --token 3
check "an option with no value" refuses "needs a value" go --prompt
check "--temperature -1" refuses "from 0 to 100" go --temperature -1
check "--top_p 1.5" refuses "from 0 to 1" go --top_p 1.5
check "--beam 0" refuses "from 1 to 256" go --beam 0
check "--tokens 1.5" refuses "whole number" go --tokens 1.5
much_text() {
  (ulimit -v 2000 && "$generate" --help) >/dev/null 2>&1 || ! (ulimit -v 3000000) 2>/dev/null &&
    { echo "ulimit -v does not bite here: not checked"; return; }
  (ulimit -v 3000000 && refuses "lower" "$generate" run --tokens 10000000 --samples 256)
}
check "--tokens 10000000 --samples 256" much_text
check "--greedy --beam 3" refuses "only one" go --greedy --beam 3
check "--samples 2 --beam 3" refuses "same text" go --samples 2 --beam 3
check "--samples 2 --temperature 0" refuses "same text" go --samples 2 --temperature 0
check "--score with --prompt" refuses "leave out" go --score abc --prompt abc
check "--compare --explain" refuses "leave out" go --compare --explain
check "--score of one byte" refuses "two bytes or more" go --score a
check "--score of nothing" refuses "two bytes or more" go --score ""
check "an SVG where none can be written" refuses "cannot be written" go --attention no/a.svg
broken() {   # SED: with this change to config.json
  rm -rf bad; mkdir bad
  cp run/model.safetensors bad
  sed "$1" run/config.json >bad/config.json
  refuses "$2" "$generate" bad
}
check "another shape" broken 's/"n_embd": 16/"n_embd": 8/' "two models"
check "another vocabulary" broken 's/"vocab_size": 256/"vocab_size": 99/' "two models"
check "a shape too large for the file" broken 's/"n_embd": 16/"n_embd": 64000/' "two models"
check "too many layers for the file" broken 's/"n_layer": 2/"n_layer": 999/' "two models"
check "heads that do not divide" broken 's/"n_head": 2/"n_head": 3/' "not divisible"
small_vocabulary() {   # trained on bytes below 100
  printf '%0600d' 0 >digits
  "$train" digits --n_layer 1 --n_head 1 --n_embd 8 --block_size 8 --vocab_size 100 --max_steps 2 \
    --eval_interval 0 --out few >/dev/null || return 1
  "$generate" few --prompt 00 --tokens 20 >/dev/null &&
  refuses "has 100 entries" "$generate" few --prompt zero
}
check "a vocabulary of 100: a prompt must be of these" small_vocabulary
large_vocabulary() {
  "$train" text --n_layer 1 --n_head 1 --n_embd 8 --block_size 8 --vocab_size 1000 --max_steps 1 \
    --eval_interval 0 --out many >/dev/null || return 1
  "$generate" many --temperature 5 --tokens 500 | utf8 &&
  "$generate" many --beam 3 --tokens 20 >/dev/null
}
check "a vocabulary of 1000: only bytes are written" large_vocabulary

not_finite() {   # the last number becomes NaN
  rm -rf bad; cp -r run bad
  printf '\377\377\377\177' | dd of=bad/model.safetensors bs=1 conv=notrunc 2>/dev/null \
    seek=$(($(wc -c <run/model.safetensors) - 4))
  refuses "inf or nan" "$generate" bad && refuses "inf or nan" "$generate" bad --beam 2 &&
  refuses "inf or nan" "$generate" bad --score text &&
  refuses "inf or nan" "$generate" bad --attention bad.svg --prompt abc --tokens 0 && [ ! -f bad.svg.tmp ]
}
check "numbers that are none" not_finite

# ---- Damaged folders, under sanitizers: opened, or refused in a line; no crash, no hang

if [ "${SANITIZE:-yes}" = yes ]; then
  wait
  asan=$tmp/asan
  seed=1
  random() {   # sets r: below $1
    seed=$(((seed * 69069 + 12345) % 2147483648)); r=$((seed / 128 % $1))
  }
  mutate() {   # FILE RANGE: one to three bytes, of the first RANGE, become others
    random 3
    for change in 1 2 3; do
      [ $change -gt $((r + 1)) ] && break
      random "$2"; at=$r
      random 256
      printf "$(printf '\\%03o' "$r")" | dd of="$1" bs=1 seek="$at" conv=notrunc 2>/dev/null
    done
  }
  survives() {   # runs it on bad/
    "$asan" bad --tokens 20 --threads 1 --prompt Once >shown 2>&1; code=$?
    [ $code = 0 ] && opened=$((opened + 1)) && return
    [ $code = 1 ] && [ "$(grep -c '^generate: ' shown)" = 1 ] &&
      ! grep -q 'Sanitizer\|runtime error' shown && return
    echo "exit code $code"; cat shown; return 1
  }
  size=$(($(wc -c <run/model.safetensors)))
  fuzz() {   # KIND TIMES
    turn=0 opened=0
    while [ $turn -lt "$2" ]; do
      turn=$((turn + 1))
      rm -rf bad; cp -r run bad; rm -f bad/state.safetensors
      case $1 in
        truncated) random $size; head -c $r run/model.safetensors >bad/model.safetensors ;;
        header) mutate bad/model.safetensors 2200 ;;
        numbers) mutate bad/model.safetensors $size ;;
        config) mutate bad/config.json "$(($(wc -c <run/config.json)))" ;;
      esac
      survives || { cp -r bad "/tmp/fuzz_$1_$turn"; echo "kept in /tmp/fuzz_$1_$turn"; return 1; }
    done
    [ "$1" != truncated ] || [ $opened = 0 ]
  }
  if [ -x "$asan" ]; then
    check "sanitizers: as it is" "$asan" run --tokens 40 --threads 2 --prompt "从前" --explain
    check "sanitizers: --compare" "$asan" run --tokens 40 --threads 2 --compare
    check "sanitizers: --samples" "$asan" run --tokens 40 --threads 2 --samples 17
    check "sanitizers: --attention, --score" "$asan" run --attention b.svg --score "Once a fox was"
    check "sanitizers: a vocabulary of 1000" "$asan" many --tokens 40 --explain
    check "40 truncated model.safetensors" fuzz truncated 40
    check "150 damaged headers" fuzz header 150
    check "80 damaged files of numbers" fuzz numbers 80
    check "100 damaged config.json" fuzz config 100
  else
    echo "     $CC has no sanitizers here: damaged folders are not tried"
  fi
fi
echo "$passed passed, $failed failed"
[ $failed = 0 ]
