#!/bin/sh
# Checks the whole program: killing it, feeding it nonsense, taking its memory and its disk away.
#   sh .ci/train.sh [PROGRAM] [TALES]      PROGRAM is ./train, TALES data/tales if not given
# CC (cc) builds the sanitizer versions; SANITIZE=no leaves them out; ONLY=WORD runs the checks that
# have it in their name. Run from the repository root.

export LC_ALL=C ASAN_OPTIONS=detect_leaks=0 TSAN_OPTIONS=atexit_sleep_ms=0
here=$(pwd)
absolute() { case $1 in /*) echo "$1" ;; *) echo "$here/$1" ;; esac; }
train=$(absolute "${1:-./train}")
tales=$(absolute "${2:-data/tales}")
CC=${CC:-cc}
tmp=$(mktemp -d) && cd "$tmp" || exit 1
trap 'cd /; umount "$tmp/disk" 2>/dev/null; rm -rf "$tmp"' EXIT
trap 'exit 130' INT TERM

passed=0 failed=0
check() {   # NAME COMMAND: passes if the command succeeds; what it printed is shown if it fails
  name=$1; shift
  echo "$name" | grep -q "${ONLY:-.}" || return
  if "$@" >report 2>&1; then echo "ok $name"; passed=$((passed + 1))
  else echo "FAIL $name"; failed=$((failed + 1)); tail -20 report | cut -c1-300 | sed 's/^/     /'
  fi
}
need() { [ -x "$1" ] || { echo "no program $1: build it first"; exit 1; }; }
need "$train"; need "$tales"

# The sanitizer versions are built while the first checks run
if [ "${SANITIZE:-yes}" = yes ]; then
  build() { $CC -std=c11 -D_GNU_SOURCE -g "$@" "$here/train.c" -pthread -lm; }
  (build -O1 -fsanitize=address,undefined -fno-sanitize-recover=all -o asan >asan.log 2>&1 &&
   build -O1 -fsanitize=thread -o tsan >tsan.log 2>&1 && $CC -o fuzz "$here/.ci/fuzz.c") &
fi

# A model so small that a step takes a tenth of a millisecond; texts of 4000 and 400 bytes
"$tales" tales.txt --bytes 4000 --seed 1 >/dev/null || exit 1
cp tales.txt text            # without the floor
tail -c 400 text >last       # what is validated
mkdir folder
small="--n_layer 1 --n_head 2 --n_embd 8 --block_size 8 --batch_size 2"
flat="--warmup 0 --learning_rate 1e-3 --min_lr 1e-3"   # a learning rate that does not depend on max_steps
go() { "$train" text $small --threads 2 "$@"; }
limits_bite() {   # can the address space be limited here?
  (ulimit -v 2000 && "$train" --help) >/dev/null 2>&1 && return 1
  (ulimit -v 3000000 && "$train" --help) >/dev/null 2>&1
}
range_of() {   # FILE TENSOR: where its bytes begin and end, counted from 1
  header=$(head -c 8 "$1" | od -An -tu8 | tr -d ' ')
  head -c $((header + 8)) "$1" | tr '{' '\n' | sed -n "/\"$2\":\$/{n;s/.*offsets\":.\([0-9]*\),\([0-9]*\).*/\1 \2/p;}" |
    { read -r from to; echo $((header + 9 + from)) $((header + 8 + to)); }
}
same() { for f in model state; do cmp "$1/$f.safetensors" "$2/$f.safetensors" || return 1; done; }
header_size() { od -An -tu4 -N4 "$1" | tr -d ' '; }
header() { tail -c +9 "$1" | head -c "$(header_size "$1")"; }
refuses() {   # PATTERN ARGUMENTS: the line must match the pattern
  pattern=$1; shift
  "$train" "$@" >out.txt 2>err.txt </dev/null
  code=$?
  if [ $code = 0 ] || [ $code -gt 125 ] || [ "$(wc -l <err.txt)" != 1 ] ||
     ! grep -Eq "^train: .*$pattern" err.txt || grep -qi sanitizer err.txt; then
    echo "train $*: exit code $code, expected a line with \"$pattern\""; cat err.txt; return 1
  fi
  clean .
}
near() {   # FILE FILE OFF: the same words, but for numbers that are so little off (of percentages: 0.11)
  awk -v off="$3" 'FNR == NR { for (i = 1; i <= NF; i++) word[++n] = $i; next }
    { for (i = 1; i <= NF; i++) {
        x = word[++m]; d = x - $i; if (d < 0) d = -d
        if (x != $i && (x !~ /^[0-9.]+[%,]*$/ || $i !~ /^[0-9.]+[%,]*$/ || d > (x ~ /%/ ? 0.11 : off))) {
          print x, "and", $i; bad = 1 } } }
    END { exit bad || n != m || !n }' "$1" "$2"
}
clean() { [ -z "$(find "$@" -name '*.tmp')" ] || { find "$@" -name '*.tmp'; return 1; }; }
seed=$$
random() {   # sets $random to a number below $1
  seed=$(((seed * 69069 + 12345) % 2147483648)) random=$((seed / 65536 % $1))
}

# ---- Killed, interrupted, resumed

survives_kill() {   # OPTIONS: kill -9 at 12 random moments, more than half of them during a save
  go --out never --max_steps 120 --eval_interval 1 "$@" || return 1
  kills=0 torn=0
  while [ $kills -lt 12 ]; do
    rm -rf killed
    done=no
    while [ $done = no ] && [ $kills -lt 12 ]; do
      threads=$((kills % 3 * 2 + 1)) again=
      [ -f killed/state.safetensors ] && again=--resume
      "$train" text $small --out killed --max_steps 120 --eval_interval 1 "$@" --threads $threads \
        $again & pid=$!
      random 200; sleep "0.$(printf %03d $((random + 20)))"
      kill -9 $pid && kills=$((kills + 1)) || done=yes
      wait $pid
      ls killed/*.tmp && torn=$((torn + 1))
    done
  done 2>/dev/null
  echo "$kills kills, $torn left a half-written temporary file behind"
  again=
  [ -f killed/state.safetensors ] && again=--resume
  go --out killed --max_steps 120 --eval_interval 1 "$@" $again || return 1
  same never killed && clean killed
}
check "kill -9 at random moments, resumed on 1, 3 and 5 threads: bit for bit" survives_kill
check "the same with --accumulate 3 --optimizer momentum" survives_kill --accumulate 3 \
  --optimizer momentum

survives_cut() {   # the system kills it (SIGXFSZ) at the byte that would make a file too long
  go --out whole --max_steps 20 --eval_interval 5 $flat || return 1
  ended=no
  for blocks in 0 1 8 20 26 27 60 78 200; do
    rm -rf cut
    go --out cut --max_steps 10 --eval_interval 5 $flat || return 1
    (ulimit -f $blocks; go --out cut --max_steps 20 --resume >/dev/null) && ended=$blocks
    go --out cut --max_steps 20 --resume || return 1
    same whole cut || return 1
  done
  [ $ended = 200 ]   # and before, it was killed
}
check "killed in the middle of writing each file, resumed: bit for bit" survives_cut

until_it_runs() {   # no longer than 10 s
  tries=100
  until grep -q ^step started || [ $tries = 0 ]; do sleep 0.1; tries=$((tries - 1)); done
}
survives_interrupt() {   # SIGNAL
  rm -rf long stopped
  rm -f started; "$train" text $small $flat --out stopped --max_steps 1000000 --eval_interval 0 >started & pid=$!
  until_it_runs; kill -"$1" $pid; wait $pid
  code=$?
  [ $code = 130 ] || { echo "exit code $code, expected 130"; return 1; }
  step=$(sed -n '$s/^[^,]*,\([0-9]*\),.*/\1/p' stopped/log.csv)
  [ "$step" -gt 0 ] && [ "$step" -lt 1000000 ] || { echo "stopped at step $step"; return 1; }
  go --out stopped --max_steps $((step + 50)) --resume --threads 5 || return 1
  go --out long --max_steps $((step + 50)) --eval_interval 0 $flat || return 1
  cmp long/model.safetensors stopped/model.safetensors && clean stopped
}
check "SIGINT finishes the step, saves, exits 130; resumed: bit for bit" survives_interrupt INT
check "SIGTERM likewise" survives_interrupt TERM
hangup() {
  if sh -c 'kill -HUP $$'; then echo "SIGHUP is ignored here, as under nohup: not checked"
  else survives_interrupt HUP; fi
}
check "SIGHUP likewise" hangup

head -c 100000000 /dev/zero >long_text
interrupt_evaluation() {   # the first, of some seconds: what was in the folder stays
  go --out early --max_steps 4 && cp -r early early_kept || return 1
  rm -f begun; "$train" long_text $small --out early >begun & pid=$!
  tries=100; until grep -q ^device begun || [ $tries = 0 ]; do sleep 0.1; tries=$((tries - 1)); done
  kill -INT $pid; before=$(date +%s); wait $pid
  [ $? = 130 ] && [ $(($(date +%s) - before)) -lt 5 ] && diff -r early early_kept
}
check "SIGINT in an evaluation: it ends at once, and what was there stays" interrupt_evaluation
interrupt_last_evaluation() {   # of 5 seconds; and --resume makes up for one that is missing
  rm -rf early begun; "$train" long_text $small --out early --max_steps 1 --eval_interval 0 || return 1
  "$train" long_text --out early --resume --max_steps 2 --eval_interval 5 --threads 1 >begun & pid=$!
  tries=100; until grep -q ^device begun || [ $tries = 0 ]; do sleep 0.1; tries=$((tries - 1)); done
  sleep 1; kill -INT $pid; wait $pid
  [ $? = 130 ] && cat begun && grep "stopped after step 2, which is saved" begun || return 1
  go --max_steps 4 --eval_interval 4 --out late && sed '$s/,[0-9.]*,[0-9.]*\(,[0-9.]*,[0-9.]*\)$/,,\1/' late/log.csv >log &&
    cp late/log.csv full && cp log late/log.csv && ! cmp log full || return 1
  go --resume --out late && cut -d, -f1-10 late/log.csv >log && cut -d, -f1-10 full | cmp - log
}
check "SIGINT in the last evaluation: the run is stopped, not finished" interrupt_last_evaluation

second_interrupt() {
  rm -f started; "$train" text $small --out second --accumulate 1000000 --eval_interval 0 >started & pid=$!
  sleep 1; kill -INT $pid; sleep 0.1; kill -INT $pid; wait $pid
  [ $? = 130 ] && clean second && [ ! -f second/state.safetensors ]
}
check "a second SIGINT leaves at once, with 130" second_interrupt

any_threads() {
  for n in 1 2 5; do
    "$train" text $small --n_embd 24 --n_head 3 --max_steps 60 --eval_interval 20 --accumulate 2 \
      --threads $n --out threads$n || return 1
  done
  same threads1 threads2 && same threads1 threads5
}
check "1, 2 and 5 threads: the same bytes" any_threads

twice() {
  go --out twice --max_steps 20 --eval_interval 10 && cp -r twice before || return 1
  go --out twice --resume && go --out twice --resume && same twice before || return 1
  go --out twice --resume --max_steps 40 >log || return 1
  head -22 twice/log.csv | cut -d, -f1-6 >rows
  cut -d, -f1-6 before/log.csv | cmp - rows || return 1
  tail -1 log | grep '^step 40 ' && [ "$(wc -l <twice/log.csv)" = 42 ]
}
check "--resume of a finished run changes nothing; with more --max_steps it goes on" twice

# ---- What it prints and writes

go --out run --max_steps 60 --eval_interval 20 >printed
last_line() {
  tail -1 printed
  tail -1 printed | grep -Eq "^step 60 \| train [0-9]+\.[0-9]{4} \| val [0-9]+\.[0-9]{4} \| \
[0-9]+\.[0-9]{2} ms/step \| [0-9]+ tokens/s \| [0-9]+\.[0-9] GFLOP/s \| threads 2$"
}
check "the last line is in its documented form" last_line
check "no control characters where there is no terminal" \
  eval '[ "$(tr -d "\n\t\040-\176\200-\377" <printed | wc -c)" = 0 ]'
check "files of a run: config, log, plot, model, state, tokenizer, nothing else" \
  eval '[ "$(ls -a run | tr "\n" " ")" = \
          ". .. .lock config.json log.csv loss.svg model.safetensors state.safetensors tokenizer.json \
tokenizer_config.json " ]'
check "log.csv: 11 fields, all updates in order, each with its numbers" awk -F, '
  NF != 11 { print "line", NR, "has", NF, "fields"; exit bad = 1 }
  NR == 1 { if ($1 $2 != "trainerupdate") exit bad = 1; next }
  $2 != NR - 2 || $3 != $2 * 16 { print "line", NR; exit bad = 1 }
  NR > 2 && !($4 > 0 && $5 >= 0 && $5 <= 1 && $9 <= 1 && $6 > 0 && $7 > 0) { print "line", NR; exit bad = 1 }
  ($8 > 0) != ($2 % 20 == 0) { print "val in line", NR; exit bad = 1 }
  END { exit bad || NR != 62 }' run/log.csv
well_formed() {   # every tag closes itself, or the one opened last
  awk 'BEGIN { RS = "<" } NR > 1 {
    if (!index($0, ">")) bad = 1
    split($0, word, /[ >\n]/); tag = word[1]
    if (substr(tag, 1, 1) == "/") { if (open[depth--] != substr(tag, 2)) bad = 1 }
    else if ($0 !~ /\/>/) open[++depth] = tag
    if ($0 ~ /nan|inf/) bad = 1
  } END { exit bad || depth || NR < 20 }' "$1" || return 1
  if command -v xmllint; then xmllint --noout "$1"; fi
}
check "loss.svg: well-formed, two curves, no NaN in it" \
  eval 'well_formed run/loss.svg && [ "$(grep -c "<polyline" run/loss.svg)" = 2 ]'
with_floor() { "$train" tales.txt $small --max_steps 4 --eval_interval 2 --out floor >floor.txt; }
check "loss.svg without an evaluation: one curve, no NaN in it" \
  eval 'go --max_steps 3 --eval_interval 0 --out unseen && well_formed unseen/loss.svg &&
        ! grep validation unseen/loss.svg'
check "the floor of the default text is in the first lines and in the plot" \
  eval 'with_floor && grep "floor [0-9]" floor.txt && grep "floor [0-9]" floor/loss.svg &&
        well_formed floor/loss.svg'
evaluates() {
  "$train" last --eval --out run --threads 2 >eval.txt || return 1
  cat eval.txt; tail -1 run/log.csv
  tail -1 eval.txt | grep -E '^loss [0-9]+\.[0-9]{6}$' &&
    [ "$(tail -1 eval.txt)" = "loss $(tail -1 run/log.csv | cut -d, -f8)" ]
}
check "--eval of the last tenth is the validation loss, to the last digit" evaluates

compares() {
  go --compare 3 --max_steps 20 --eval_interval 6 --out compare >compare.txt || return 1
  tail -1 compare.txt
  tail -1 compare.txt | grep '^step 18 ' && well_formed compare/loss.svg &&
    [ "$(grep -c ^single-step, compare/log.csv)" = 19 ] && [ "$(grep -c ^multi-step, compare/log.csv)" = 7 ] &&
    go --compare 3 --max_steps 20 --eval_interval 7 --out compare7 >/dev/null || return 1
  # where one is evaluated, so is the other, and both have seen as many tokens
  last=$(awk -F, '$8 != "" { val[$1] = $8 } END { printf "single-step %.4f, multi-step %.4f, %s",
    val["single-step"], val["multi-step"],
    val["single-step"] < val["multi-step"] ? "single-step" : "multi-step" }' compare/log.csv)
  grep -F "at equal tokens (288 each): $last ahead" compare.txt || return 1
  for one in single multi; do
    awk -F, -v one=$one-step '$1 == one && $8 != "" { print $3 }' compare7/log.csv >$one.tokens
  done
  cat single.tokens
  cmp single.tokens multi.tokens
}
check "--compare 3 over 20 steps: 18 single-step updates, 6 multi-step" compares
compare_alone() {   # on the same tokens with the same rates as a run without --compare
  go --max_steps 18 --eval_interval 6 --out alone || return 1
  sed -n 's/^single-step,//p' compare/log.csv | cut -d, -f1-8 >single.rows
  sed -n 's/^train,//p' alone/log.csv | cut -d, -f1-8 >train.rows
  cmp single.rows train.rows
}
check "its single-step trainer is the run without --compare" compare_alone
compare_fair() {
  go --compare 3 --max_steps 20 --eval_interval 6 --out fair >fair.txt || return 1
  cat fair.txt; [ "$(ls fair | tr '\n' ' ')" = "log.csv loss.svg " ] || return 1
  [ "$(awk -F, '$2 == 0 { print $8 }' fair/log.csv | uniq | wc -l)" -eq 1 ] || return 1
  at() { awk -F, -v t=$1-step -v u=$2 -v c=$3 '$1 == t && $2 == u { printf "%.4f", $c }' fair/log.csv; }
  percent() { awk -v x="$(at $1 $2 9)" 'BEGIN { printf "%.1f%%", 100 * x }'; }
  echo "at equal updates (6 each): single-step $(at single 6 8), multi-step $(at multi 6 8)," >want
  echo 288 18 $(at single 18 8) $(percent single 18) 6 $(at multi 6 8) $(percent multi 6) >>want
  { sed -n 's/^\(at equal updates .*multi-step [0-9.]*,\).*/\1/p' fair.txt
    awk '$1 == 288 { print $1, $3, $5, $6, $10, $12, $13 }' fair.txt; } >got
  near want got 6e-5 || return 1
  go --compare 3 --max_steps 20 --eval_interval 0 --out fair &&
    go --compare 3 --max_steps 6 --init run --out fair || return 1
  [ "$(awk -F, '$2 == 0 { print $8 }' fair/log.csv | uniq | wc -l)" -eq 1 ]
}
check "--compare: one start, also with --init; the verdict is that of the log; no checkpoint" compare_fair

# ---- What it says is so

header_says() {
  grep -F '3000 parameters' printed && grep -F '3600 to train, 400 to validate' printed &&
  grep -F '; 0.3 passes' printed && grep '^step  0/60 | train - | val [0-9.]*$' printed
}
check "the first lines: parameters, bytes, passes" header_says
lines_say() {   # each evaluation's line, and the shares of --profile
  awk -F, 'NR > 2 && $8 != "" { printf "step %d/60 | train %.4f | val %.4f\n", $2, $4, $8 }' run/log.csv >want
  sed -n 's/^\(step [0-9]*.60 | train [0-9.]* | val [0-9.]*\).*left$/\1/p' printed >got
  near want got 6e-5 || return 1
  go --max_steps 30 --eval_interval 0 --profile --out sums >profile.txt || return 1
  awk '/^all / { ms = $2 } NF >= 4 && $4 ~ /%$/ { n++; sum += $3; share += $4 }
    END { exit n < 12 || share < 99 || share > 101 || sum / ms < 0.99 || sum / ms > 1.01 }' profile.txt
}
check "the lines of evaluations are those of the log; the shares of --profile add up" lines_say
adds_up() {   # the last line is that of the log, and its seconds add up, also after --resume
  go --max_steps 21 --accumulate 3 --eval_interval 0 --out sums >sums.txt || return 1
  go --max_steps 42 --resume --eval_interval 21 --out sums >sums.txt || return 1
  tail -3 sums.txt; tail -21 sums/log.csv | cut -d, -f10 | sort -n | sed -n 11p >median
  awk -v median="$(cat median)" -F, 'function off(a, b) { return a < b * 0.97 || a > b * 1.03 }
    FNR == NR && FNR > 1 { total += $10; if (off($11, total) || $3 != $2 * 48) bad = 1; train = $4; val = $8 }
    FNR < NR && / ms.step / {
      split($0, w, / \| /); split(w[4], ms, " "); split(w[5], rate, " "); split(w[6], gflop, " ")
      split(w[2], t, " "); split(w[3], v, " "); t[2] -= train; v[2] -= val
      if (t[2]*t[2] + v[2]*v[2] > 7e-9 || off(rate[1], 48 / median) ||
          off(ms[1] + 0.1, median * 1e3 + 0.1) || off(gflop[1] + 2, 829440e-9 / median + 2)) bad = 1
      seen = 1 }
    END { exit bad || !seen }' sums/log.csv sums.txt
}
check "the last line is that of the log, whose seconds add up, also after --resume" adds_up
finished() {
  go --max_steps 6 --eval_interval 3 --out fin | tail -1 >f1; go --resume --out fin | tail -1 >f2
  grep '^step 6 ' f1 && cut -d '|' -f 2 f1 >g1 && cut -d '|' -f 2 f2 | cmp - g1
}
check "--resume of a finished run prints its last training loss" finished
eval_lines() {
  awk '$1 == "perplexity" { p = $2 } $1 == "bits" { b = $4 } $1 == "loss" { l = $2 } / 49 windows of 8 / { w = 1 }
    END { d = p / exp(l) - 1; e = b * log(2) - l; exit !(w && d*d < 1e-8 && e*e < 1e-10) }' eval.txt &&
  sed -n 's/^accuracy //p' eval.txt >got && tail -1 run/log.csv | cut -d, -f9 >want && near want got 6e-5
}
check "--eval: windows, perplexity, bits, accuracy" eval_lines
expected() {   # FOLDER: the points of its curves, from the log
  awk -F, 'NR > 1 { rows++; if (!($1 in seen)) { seen[$1] = 1; name[++names] = $1 }
      if ($3 > x1) x1 = $3
      for (i = 4; i <= 8; i += 4) if ($i != "") {
        if (!n++ || $i < y0) y0 = $i; if (n == 1 || $i > y1) y1 = $i
        p[$1, i] = p[$1, i] $3 "," $i " " } }
    END { y0 = int(2*y0) / 2; y1 = int(2*y1 + 1) / 2
      for (j = 1; j <= names; j++) for (i = 4; i <= 8; i += 4) {
        every = i == 4 ? int(rows / 500) + 1 : 1; n = split(p[name[j], i], q, " "); sum = 0
        for (k = 1; k <= n; k++) { split(q[k], xy, ","); sum += xy[2]; if (k % every) continue
          print 64 + xy[1] / x1 * 636 "," 444 - (sum / every - y0) / (y1 - y0) * 400; sum = 0 }
        print "end" } }' $1/log.csv
}
curves() {   # FOLDER
  expected $1 >e1; sed -n 's/^<polyline.*points="\([^"]*\)".*/\1end/p' $1/loss.svg | tr ' ' '\n' >p1
  paste -d, e1 p1 | awk -F, '{ a = $1 - $3; b = $2 - $4
    if (NF == 2 ? $1 != $2 : NF != 4 || a*a > 0.02 || b*b > 0.02) { print; bad = 1 } } END { exit bad || NR < 60 }'
}
plots() {
  curves run && grep -F '>960 tokens<' run/loss.svg &&
  sed -n 's/.*>validation \([0-9.]*\)<.*/\1/p' run/loss.svg >got && tail -1 run/log.csv | cut -d, -f8 >want &&
  near want got 6e-4 &&
  go --compare 2 --max_steps 600 --eval_interval 200 --learning_rate 1e-2 --out fair && curves fair
}
check "loss.svg has the points of log.csv, also averaged, and of two trainers" plots
floors() {
  cp tales.txt grown && echo x >>grown && cp tales.txt.floor grown.floor
  "$train" grown $small --max_steps 0 --out low >low.txt && ! grep floor low.txt &&
  "$train" tales.txt $small --max_steps 0 --out low |
    grep -F "floor $(sed -n 's/^val_nats_per_byte //p' tales.txt.floor | awk '{ printf "%.4f", $1 }')"
}
check "the floor is that of validation, and of this text only" floors
defaults() {
  "$train" --help | sed -n 's/^ *--\([a-z0-9_]* [^ ]*\) .*/\1/p' | tr '\n' ';' | grep -F "n_layer 4;n_head 4;\
n_embd 128;block_size 64;batch_size 12;accumulate 1;max_steps 2000;optimizer adamw;vocab_size 256;learning_rate N;\
min_lr N;warmup 100;weight_decay N;beta1 0.9;beta2 0.99;grad_clip 1.0;eval_interval 250;seed 1337;" &&
  "$train" --help | grep -F "sgd (rate 0.1), momentum (rate 0.01), adagrad (rate 0.01), adadelta (rate 1), \
rmsprop (rate 0.001), adam (rate 0.001), adamw (rate 0.001)" || return 1
  go --max_steps 1 --out d1 && go --max_steps 1 --optimizer adam --out d2 &&
  header d1/state.safetensors | grep -F '"weight_decay":"0.1' &&
  header d2/state.safetensors | grep -F '"weight_decay":"0"'
}
check "the defaults are those of the README" defaults
odd_numbers() {
  go --learning_rate 0.00123456789012345 --beta1 0.87654321 --beta2 0.987654321 --weight_decay 0.0123456789 \
    --grad_clip 0.123456789 --seed 7 --warmup 0 --max_steps 4 --min_lr 0 --eval_interval 2 --out d1 || return 1
  for s in '"learning_rate":"0.00123456789012345' '"seed":"7"' '"beta1":"0.87654321' '"beta2":"0.98765432' \
           '"weight_decay":"0.0123456789' '"grad_clip":"0.123456789' '"batch_size":"2"' '"accumulate":"1"' \
           '"warmup":"0"' '"max_steps":"4"' '"min_lr":"0"' '"eval_interval":"2"' '"precision":"fp32"'; do
    header d1/state.safetensors | grep -F "$s" >/dev/null || { echo "$s is not there"; return 1; }
  done
}
check "the options are saved, with all their digits" odd_numbers

# ---- Folders and texts

alone() {
  rm -f begun; "$train" text $small --out taken2 --max_steps 1000000 --eval_interval 0 >begun & pid=$!
  tries=100; until grep -q ^device begun || [ $tries = 0 ]; do sleep 0.1; tries=$((tries - 1)); done
  refuses 'is training there' text $small --out taken2; code=$?
  kill -INT $pid; wait $pid; return $code
}
check "a second run in the same folder is refused" alone
another_text() {
  head -c 3999 text >t2; printf '#' >>t2
  [ "$(tail -c 1 text)" != '#' ] && refuses 'another text' t2 --out run --resume
}
check "--resume refuses a text that differs in its last byte" another_text
replaced() {
  go --max_steps 2 --n_head 2 --out over && go --max_steps 2 --n_head 4 --out over &&
  grep '"n_head": 4' over/config.json && "$train" text --eval --out over || return 1
  for V in 1000 128; do
    go --max_steps 1 --vocab_size $V --out over && [ ! -e over/tokenizer.json ] || return 1
  done
}
check "a run over another: no file of the other stays" replaced
nothing() {
  rm -rf zero; go --max_steps 0 --out zero && [ -f zero/model.safetensors ] &&
  go --max_steps 0 --out "$tmp/x/y/z" && [ -f x/y/z/log.csv ]
}
check "--max_steps 0 saves; --out makes the folders above it" nothing
shorter() {
  "$train" last --eval --out run --block_size 4 | grep '^loss [0-9]' &&
  refuses 'leave the option out' last --eval --out run --block_size 16
}
check "--eval with a shorter context, not with a longer one" shorter
edge() { head -c 400 /dev/zero | tr '\000' d >ds; refuses 'vocabulary has 100' ds $small --vocab_size 100 --max_steps 1; }
check "a byte that equals --vocab_size is refused" edge

# ---- Odd but good input

odd() {
  head -c 4000 /dev/zero >zeros && tr '\000' a <zeros >one_byte
  awk 'BEGIN { for (i = 0; i < 4000; i++) printf "%c", (i * i / 7) % 256 }' >binary
  sed 's/$/\r/' text >crlf; tr -d '\n' <text >one_line
  for t in zeros one_byte binary crlf one_line; do
    "$train" $t $small --max_steps 3 --eval_interval 1 --out odd >odd.txt || return 1
    [ "$(tr -d '\n\t\040-\176\200-\377' <odd.txt | wc -c)" = 0 ] || return 1
  done
}
check "texts: zeros, one byte repeated, binary, CRLF, a single line" odd
sizes() {
  go --max_steps 3 --out sizes --n_embd 1 --n_head 1 --block_size 1 --batch_size 1 &&
  go --max_steps 3 --out sizes --n_layer 50 --n_embd 3 --n_head 3 --block_size 3 &&
  go --max_steps 2 --out sizes --vocab_size 1000 --warmup 100 --beta1 0 --beta2 0 &&
  go --max_steps 0 --out sizes && go --max_steps 1 --eval_interval 0 --out sizes &&
  "$train" zeros $small --vocab_size 1 --max_steps 2 --out sizes
}
check "sizes: one channel, 50 layers, a vocabulary of 1 and of 1000, no step" sizes
awkward="a b'c\"d\\e"
names() {
  mkdir "$awkward" && cp text "$awkward/$awkward" || return 1
  "$train" "$awkward/$awkward" $small --max_steps 4 --out "$awkward/out/" || return 1
  "$train" $small --resume --max_steps 8 --out "$awkward/out/" >names.txt || return 1
  grep -F "$awkward/$awkward" names.txt
}
check "a path with spaces, quotes and a backslash, found again by --resume" names
for optimizer in sgd momentum adagrad adadelta rmsprop adam adamw; do
  check "--optimizer $optimizer, stopped and resumed: bit for bit" eval "
    go --optimizer $optimizer --max_steps 8 --eval_interval 4 $flat --n_embd 24 --out o1 &&
    go --optimizer $optimizer --max_steps 4 --eval_interval 4 $flat --n_embd 24 --out o2 &&
    go --max_steps 8 --resume --out o2 --n_embd 24 && same o1 o2 && rm -rf o1 o2"
done

# ---- Bad input: one line on stderr, a non-zero exit code, nothing half written

untouched() { same run kept && diff -r run kept; }

bad_texts() {
  : >empty; echo short >short
  refuses 'no/such: No such file' no/such $small && refuses 'Is a directory' folder $small &&
  refuses 'has 0 bytes' empty $small && refuses 'has 6 bytes' short $small &&
  refuses 'block_size' text --block_size 4000 && refuses 'block_size' text --block_size 400 &&
  refuses 'No such file' '' && refuses 'vocabulary has 100 entries' text $small --vocab_size 100 &&
  refuses 'window' short --eval --out run
}
bad_values() {   # of every option that takes a number, whatever the table says
  "$train" --help | sed -n 's/^ *--\([a-z0-9_]*\) .*(\([^ ]*\) to \([^ ]*\))$/\1 \2 \3/p' >numbers
  [ "$(wc -l <numbers)" -ge 18 ] || { echo "found only $(cat numbers) in --help"; return 1; }
  while read -r option low high; do
    for value in -1 -0.0001 1e99 99999999999999999999 nan inf -inf x 1x 1,5 '' ' ' 0x 1e; do
      refuses "$option" text $small "--$option" "$value" || return 1
      refuses "$option" text $small "--$option=$value" || return 1
    done
    if [ "$low" != 0 ]; then refuses "$option" text $small "--$option" 0 || return 1; fi
    refuses "$option needs a value" text $small "--$option" || return 1
  done <numbers
  for option in n_layer n_head n_embd block_size batch_size accumulate max_steps warmup seed \
                threads compare eval_interval vocab_size; do
    refuses "whole number" text $small --$option 2.5 || return 1
  done
}
bad_options() {
  refuses 'unknown option --n_layers' text --n_layers 3 && refuses '--max_step=' text --max_step=3 &&
  refuses 'unknown option --learning-rate' text --learning-rate 1 &&
  refuses 'unknown option -n_layer' text -n_layer 3 && refuses '--help' text -h &&
  refuses 'needs a value' text --out && refuses 'takes no value' text --resume=yes &&
  refuses 'unexpected argument' text last && refuses 'optimizer' text --optimizer adamx &&
  refuses 'precision' text $small --out bad --precision fp64 &&
  refuses 'divisible' text --n_embd 10 --n_head 4 && refuses 'divisible' text --n_embd 2 &&
  refuses 'compare' text --compare 4 --accumulate 2 &&
  refuses 'compare' text --compare 4 --resume --out run &&
  refuses 'compare' text --compare 4 --max_steps 3 && refuses 'out' text --out '' &&
  refuses 'leave one out' text --resume --init run --out run &&
  refuses 'leave one out' text --resume --init run --out nowhere && refuses 'unknown option -;' text - ||
    return 1
  for option in --resume '--init run' '--compare 2'; do
    refuses 'eval' text --eval --out run $option || return 1
  done
  refuses 'too long' text --out "$(printf %05000d 0)"
}
bad_folders() {
  for out in text/x /proc/x /dev/null/x text; do
    refuses out text $small --out $out || return 1
  done
  mkdir -p taken/log.csv own pipe && cp text own/log.csv && cp run/config.json pipe || return 1
  refuses 'log.csv cannot be written' text $small --out taken && [ ! -s out.txt ] &&
    refuses 'is the text' own/log.csv $small --out own && cmp text own/log.csv &&
    mkfifo pipe/model.safetensors && refuses 'not a file' last --eval --out pipe || return 1
  mkdir locked && chmod 555 locked || return 1
  [ "$(id -u)" = 0 ] || refuses 'out locked' text $small --out locked
}
too_large() {
  for sizes in '--n_embd 65536 --n_layer 1000' '--batch_size 65536 --block_size 350 --n_embd 4096' \
    '--batch_size 65536 --block_size 350 --n_embd 1 --n_head 1 --n_layer 1000' \
    '--vocab_size 10000000 --n_embd 4096'; do
    refuses 'lower' text --out large $sizes || return 1
  done
  head -c 30000000 /dev/zero >huge
  refuses 'too large' huge --batch_size 65536 --block_size 1000000 --n_embd 1 --n_head 1
}
little_memory() {   # an address space of so many KB
  limits_bite || { echo "ulimit -v does not bite here: not checked"; return; }
  for limit in 20000 60000 120000; do
    (ulimit -v $limit && refuses 'memory|the system gave' text --out little --threads 2 \
       --n_embd 512 --batch_size 256) || return 1
  done
}
bad_list() {
  check "$1texts: none, a directory, empty, too short for a window" bad_texts
  check "$1values: each option given negative, absurd, empty and no numbers at all" bad_values
  check "$1options: unknown, contradicting, without value" bad_options
  check "$1output folders that cannot be made or written in" bad_folders
  check "$1sizes that no machine has memory for" too_large
}
bad_list "refuses "
check "refuses politely when memory cannot be had (ulimit -v)" little_memory

# ---- A full disk

go --out run --max_steps 60 --eval_interval 20 >/dev/null
rm -rf kept; cp -r run kept
no_stdout() {   # nor must the next file that is opened become it
  "$train" text $small --max_steps 2 --out shut 2>err.txt >&-
  [ $? = 1 ] && grep 'standard output' err.txt && [ ! -s shut/.lock ] || return 1
  said=$(ulimit -f 0; "$train" --help 2>&1 >help.txt; echo "code $?")
  echo "$said" | grep 'standard output' && [ "${said##*code }" = 1 ]
}
check "no standard output, or one that may not grow: one line, exit code 1" no_stdout
full_by_limit() {   # files may have so many blocks of 512 bytes; the signal is ignored: write fails
  for blocks in 0 1 2 8 20 26; do
    said=$(trap '' XFSZ; ulimit -f $blocks
           "$train" text $small --max_steps 70 --out run --resume 2>&1 >/dev/null; echo "code $?")
    echo "$said"
    [ "$(echo "$said" | wc -l)" = 2 ] && [ "${said##*code }" = 1 ] || return 1
    clean run && cmp run/model.safetensors kept/model.safetensors &&
      cmp run/state.safetensors kept/state.safetensors || return 1
  done
}
check "a file that cannot grow: one line, no .tmp, the old checkpoint as it was" full_by_limit
disk_size=160k
full_disk() {   # a real one: room for the checkpoint, and a little
  cp -r kept disk/run || return 1
  for left in 4 12 20; do
    dd if=/dev/zero of=disk/ballast bs=1024 count=10000 2>/dev/null   # fills it
    rm disk/ballast
    free=$(df -k disk | awk 'NR == 2 { print $4 }')
    dd if=/dev/zero of=disk/ballast bs=1024 count=$((free - left)) 2>/dev/null
    "$train" text $small --max_steps 70 --out disk/run --resume >out.txt 2>err.txt
    code=$?
    cat err.txt
    [ $code = 1 ] && [ "$(wc -l <err.txt)" = 1 ] && clean disk || return 1
    cmp disk/run/state.safetensors kept/state.safetensors || return 1
    "$train" last --eval --out disk/run || return 1      # the model is a whole one
    rm disk/ballast
  done
  "$train" text $small --max_steps 70 --out disk/run --resume   # and with room it goes on
}
mkdir disk
if [ "$(id -u)" = 0 ] && mount -t tmpfs -o size=$disk_size tmpfs disk 2>/dev/null; then
  check "a full disk: one line, no .tmp, the old checkpoint opens and resumes" full_disk
  umount disk
else echo "skip a full disk: no right to mount one"; fi

# ---- System calls that fail, one at a time

# CALLS COMMAND: for each call and each n, trains on in `broken`, a copy of `base`, while the n-th one
# fails; then COMMAND looks at what is there
failing() {
  calls=$1; shift
  tries=0
  for call in $calls; do
    n=0 last=0
    while n=$((n + 1)) && [ $n -lt 25 ]; do
      rm -rf broken fired; cp -r base broken
      LD_PRELOAD=$tmp/fail.so FAIL_CALL=$call FAIL_AT=$n FAIL_LOG=fired go --out broken "$@" >out \
        2>err
      code=$?
      [ -f fired ] || break
      tries=$((tries + 1)) last=$n
      if [ $code -gt 1 ] || { [ $code = 1 ] && [ "$(wc -l <err)" != 1 ]; } || ! clean broken ||
         ! looks_right; then
        echo "$call number $n fails: exit code $code"; cat err; return 1
      fi
    done
    [ $last -gt 0 ] || { echo "$call is never called"; return 1; }
  done
  echo "$tries tries"
}
same_model() {
  looks_right() { go --eval --out broken && go --resume --max_steps 20 --out broken && same base_end broken; }
  rm -rf base base_end
  go --max_steps 10 --eval_interval 5 $flat --out base && cp -r base base_end &&
    go --resume --max_steps 20 --out base_end || return 1
  failing "fopen fdopen fwrite fread fflush fclose fseek fsync rename unlink mkdir access stat lstat
           posix_memalign open calloc realloc" --resume --max_steps 20
}
other_model() {   # over a model of another shape: the old, the new, or none; never a mixture
  loss_of() { "$train" text --eval --out "$1" 2>&1 | tail -1; }
  looks_right() {
    case $(loss_of broken) in
      "$old" | "$new" | *"No such file"*) ;;
      *) loss_of broken; return 1 ;;
    esac
    go --resume --out broken || "$train" text --resume --out broken || return 1
    case $(loss_of broken) in "$old" | "$new") ;; *) loss_of broken; return 1 ;; esac
  }
  rm -rf base other
  go --max_steps 5 --n_embd 16 --n_layer 2 --out base && go --max_steps 5 --out other || return 1
  old=$(loss_of base) new=$(loss_of other)
  failing "open fdopen fwrite fflush fclose fseek fsync rename unlink" --max_steps 5
}
if $CC -shared -fPIC -o fail.so "$here/.ci/fail.c" -ldl 2>/dev/null; then
  check "a call that fails, anywhere: one line, and --resume ends bit for bit" same_model
  check "a call that fails while a model of another shape is replaced: no mixture" other_model
else
  echo "no LD_PRELOAD here: system calls that fail are not checked"
fi

# ---- What the files have under which name

moments() {   # momentum uses m only, rmsprop v only
  zeros() {   # FOLDER PREFIX
    set -- "$1/state.safetensors" $(range_of "$1/state.safetensors" "$2.h.0.mlp.c_fc.$part")
    [ -z "$(head -c "$3" "$1" | tail -c +"$2" | tr -d '\000' | head -c 1)" ]
  }
  for optimizer in momentum rmsprop; do
    go --optimizer $optimizer --max_steps 3 --eval_interval 0 --out $optimizer || return 1
  done
  for part in weight bias; do
    zeros momentum v && ! zeros momentum m && zeros rmsprop m && ! zeros rmsprop v || return 1
  done
}
check "state.safetensors has m and v under their names" moments
least_rate() {   # of the cosine: a tenth of --learning_rate, whatever the optimizer's own is
  go --learning_rate 0.5 --warmup 0 --max_steps 10 --out rates || return 1
  tail -1 rates/log.csv
  [ "$(tail -1 rates/log.csv | cut -d, -f7)" = 0.0610123 ] || return 1
  go --learning_rate 3e-9 --warmup 0 --max_steps 1 --out rates || return 1
  [ "$(tail -1 rates/log.csv | cut -d, -f7)" = 3e-09 ]
}
check "--min_lr is a tenth of --learning_rate; the log has small rates, too" least_rate
damaged() {   # one number becomes NaN
  rm -rf bad; cp -r run bad
  set -- $(range_of bad/model.safetensors transformer.h.0.attn.c_attn.weight)
  printf '\377\377\377\177' |
    dd of=bad/model.safetensors bs=1 conv=notrunc seek=$(($1 - 1)) 2>/dev/null
  refuses 'loss is nan' text --eval --out bad
}
check "--eval of weights that are NaN fails" damaged

# ---- A loss that becomes NaN

explodes() {
  for optimizer in sgd momentum; do
    for interval in 0 1 100; do
      rm -rf nan
      refuses 'step [0-9]+: .*(nan|inf).*kept' text $small --out nan --max_steps 500 --warmup 0 \
        --learning_rate 1e6 --grad_clip 0 --optimizer $optimizer --eval_interval $interval ||
        return 1
      if [ -f nan/model.safetensors ]; then
        "$train" last --eval --out nan | grep -E '^loss [0-9]+\.[0-9]{6}$' || return 1
      fi
    done
  done
}
check "a loss that becomes NaN: stops, says at which step; what was saved still opens" explodes
keeps_good() {
  rm -rf nan; go --out nan --max_steps 10 --eval_interval 5 && cp -r nan good || return 1
  refuses 'step 1[0-9]+: .*(nan|inf).*kept' text $small --out nan --resume --max_steps 500 \
    --learning_rate 1e6 --min_lr 1e6 --grad_clip 0 --warmup 0 --weight_decay 1000 || return 1
  same nan good
}
check "a resumed run that explodes leaves the last good checkpoint as it was" keeps_good

# ---- Checkpoints, good and hostile

go --out run --max_steps 60 --eval_interval 20 >/dev/null; rm -rf kept; cp -r run kept
"$train" last --eval --out run --threads 2 >eval.txt

numbers() { tail -c +$((9 + $(header_size "$1"))) "$1"; }
safetensors() {   # HEADER: its length, little-endian, and itself
  n=${#1}
  printf "\\$(printf %03o $((n % 256)))\\$(printf %03o $((n / 256)))\\0\\0\\0\\0\\0\\0%s" "$1"
}
edit() {   # FROM TO SED-SCRIPT: the same numbers under an edited header
  safetensors "$(header "$1" | sed "$3")" >edited && numbers "$1" >>edited && mv edited "$2"
}

hub() {   # no prefix, and a mask that is no parameter
  rm -rf hub; mkdir hub
  sed 's/1e-05/0.00001/; /n_inner/d; /tie_word/d' run/config.json >hub/config.json
  end=$(numbers run/model.safetensors | wc -c)
  mask='"h.0.attn.bias":{"dtype":"BOOL","shape":[1,1,8,8],"data_offsets":'"[$end,$((end + 64))]}"
  edit run/model.safetensors hub/model.safetensors "s/transformer\.//g; s/} *\$/,$mask}   /; s/:/ : /g; s/,/, /g" &&
    head -c 64 /dev/zero >>hub/model.safetensors || return 1
  "$train" last --eval --out hub >hub.txt || return 1
  cmp hub.txt eval.txt || return 1
  go --init hub --out hub2 --max_steps 4 --eval_interval 2 &&
  go --init run --out hub3 --max_steps 4 --eval_interval 2 &&
    cmp hub2/model.safetensors hub3/model.safetensors
}
gpt2_names() {
  for tensor in wte wpe h.0.ln_1 h.0.attn.c_attn h.0.attn.c_proj h.0.ln_2 h.0.mlp.c_fc h.0.mlp.c_proj ln_f; do
    header run/model.safetensors | grep -F "\"transformer.$tensor.weight\"" >names.txt || return 1
  done
}
check "the tensors have the names of GPT-2" gpt2_names
tied() {   # the weight of the head as well: equal to wte, which comes first, or not
  rm -rf head; mkdir head && cp run/config.json head || return 1
  end=$(numbers run/model.safetensors | wc -c)
  head='"lm_head.weight":{"dtype":"F32","shape":[256,8],"data_offsets":'"[$end,$((end + 8192))]}"
  edit run/model.safetensors head/model.safetensors "s/} *\$/,$head}   /" &&
    cp head/model.safetensors head/start &&
    numbers run/model.safetensors | head -c 8192 >>head/model.safetensors || return 1
  "$train" last --eval --out head | cmp - eval.txt || return 1
  head -c 8192 /dev/zero | cat head/start - >head/model.safetensors
  refuses 'lm_head.weight is not equal' last --eval --out head
}
check "a second copy of wte as lm_head.weight opens, a head of its own does not" tied
check "the hub's layout, without prefix and with masks, opens by --eval and --init" hub
halves() {   # DTYPE: the header of half as many bytes
  safetensors "$(header run/model.safetensors | sed "s/F32/$1/g" | awk '{
    n = split($0, part, "data_offsets\":\\["); line = part[1]
    for (i = 2; i <= n; i++) {
      split(part[i], offset, /[],]/); sub(/^[^]]*/, "", part[i])
      line = line "data_offsets\":[" offset[1] / 2 "," offset[2] / 2 part[i]
    }
    print line }')"
}
half_precision() {   # BF16 is the upper half of F32; F16 zeros are the uniform model: log 256
  rm -rf half; mkdir half && cp run/config.json half || return 1
  halves BF16 >half/model.safetensors
  numbers run/model.safetensors | od -An -v -tu1 |
    awk '{ for (i = 3; i < NF; i += 4) printf "\\%03o\\%03o", $i, $(i + 1) }' >octal
  printf "$(cat octal)" >>half/model.safetensors
  "$train" last --eval --out half >half.txt || return 1
  tail -1 half.txt
  awk '{ x[NR] = $2 } END { d = x[1] - x[2]; exit !(d * d < 1e-4 && d != 0) }' <<END || return 1
$(tail -1 half.txt)
$(tail -1 eval.txt)
END
  halves F16 >half/model.safetensors
  head -c $(($(numbers run/model.safetensors | wc -c) / 2)) /dev/zero >>half/model.safetensors
  "$train" last --eval --out half | grep '^loss 5.545177$' || return 1
  cp run/config.json half && edit run/model.safetensors half/model.safetensors \
    's/} *$/,"empty":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}/' &&
  grep -q '"empty"' half/model.safetensors &&
  [ "$("$train" last --eval --out half | tail -1)" = "$(tail -1 eval.txt)" ]   # a tensor of no numbers disturbs nothing
}
shards() {   # a model in two files, and indexes that are not right
  rm -rf two; mkdir two && cp run/config.json two && cp run/model.safetensors two/a.safetensors || return 1
  edit run/model.safetensors two/b.safetensors 's/.*/{"e":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}/' &&
    head -c $(($(wc -c <two/b.safetensors) - $(numbers run/model.safetensors | wc -c))) two/b.safetensors >b &&
    mv b two/b.safetensors
  for map in '"e":"b.safetensors","w":"a.safetensors"' '"w":"a.safetensors", "e": "b.safetensors", "v":"a.safetensors"'; do
    echo "{\"weight_map\":{$map}}" >two/model.safetensors.index.json
    [ "$("$train" last --eval --out two | tail -1)" = "$(tail -1 eval.txt)" ] || return 1
  done
  cp two/a.safetensors two/b.safetensors && refuses 'two tensors' last --eval --out two || return 1
  for map in '"e":"c.safetensors"=No such file' '"e":"../x"=outside' '"e":"\u002fx"=outside' '=names no files'; do
    echo "{\"weight_map\":{${map%=*}}}" >two/model.safetensors.index.json
    refuses "${map##*=}" last --eval --out two || return 1
  done
  rm two/model.safetensors.index.json && : >two/pytorch_model.bin && refuses save_pretrained last --eval --out two
}
check "a model in two files opens, a wrong index does not" shards
check "weights in F16 and BF16 open, and a file with an empty tensor" half_precision

hostile() {   # PATTERN HEADER BYTES: such a file is refused by --eval, --init and --resume
  mkdir -p evil && cp run/config.json evil && safetensors "$2" >evil/model.safetensors
  head -c "$3" /dev/zero >>evil/model.safetensors
  refuse_evil "$1"
}
refuse_evil() {
  cp evil/model.safetensors evil/state.safetensors && rm -rf evil2 &&
  refuses "$1" last --eval --out evil && refuses "$1" text --init evil --out evil2 --max_steps 2 &&
  refuses "$1" text --out evil --resume
}
one='{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
f32() { echo "{\"dtype\":\"F32\",\"shape\":[$1],\"data_offsets\":[$2,$3]}"; }
hostile_headers() {
  hostile 'begins at|data_offsets' "{\"a\":$(f32 2 0 8),\"b\":$(f32 2 16 24)}" 24 &&         # a hole
  hostile 'begins at|data_offsets' "{\"a\":$(f32 2 4 12)}" 12 &&                             # at the start
  hostile 'begins at|data_offsets' "{\"a\":$(f32 2 0 8),\"b\":$(f32 2 4 12)}" 12 &&          # an overlap
  hostile 'begins at|data_offsets' "{\"a\":$(f32 2 0 8),\"b\":$(f32 2 0 8)}" 8 &&
  hostile 'truncated' "{\"a\":$one}" 7 && hostile 'damaged' "{\"a\":$one}" 9 &&
  hostile 'truncated' "{\"a\":$(f32 2000 0 8000)}" 7999 &&                        # beyond the end
  hostile 'begins at|data_offsets' "{\"a\":$(f32 2 0 16)}" 16 &&                         # against its shape
  hostile 'begins at|data_offsets' "{\"a\":$(f32 2 8 0)}" 8 &&
  hostile 'fit together' "{\"a\":$(f32 4294967296,4294967296,2 0 8)}" 8 &&         # overflows
  hostile 'fit together' "{\"a\":$(f32 4611686018427387905 0 4)}" 4 &&
  hostile 'fit together' "{\"a\":$(f32 18446744073709551618 0 8)}" 8 &&
  hostile 'fit together' "{\"a\":$(f32 2 18446744073709551616 8)}" 8 &&
  hostile 'fit together' "{\"a\":$(f32 -2 0 8)}" 8 &&
  hostile 'fit together' "{\"a\":$(f32 2 -8 0)}" 8 && hostile 'fit together' "{\"a\":$(f32 2.5 0 10)}" 10 &&
  hostile 'fit together' "{\"a\":$(f32 1,1,1,1,1,1,1,1,2 0 8)}" 8 &&
  hostile 'fit together' "{\"a\":{\"dtype\":\"F31\",\"shape\":[2],\"data_offsets\":[0,8]}}" 8 &&
  hostile 'fit together' "{\"a\":{\"shape\":[2],\"data_offsets\":[0,8]}}" 8 &&
  hostile 'no tensor' "{\"a\":{\"dtype\":\"F32F32F32F32\",\"shape\":[2],\"data_offsets\":[0,8]}}" 8 &&
  hostile . "{\"a\":[]}" 0 && hostile . "{\"a\":$one,}" 8 && hostile . "{\"a\":$one" 8 &&
  hostile . "{\"a\":$one}x" 8 && hostile . "[]" 0 && hostile . "" 0 && hostile . " {}" 0 &&
  hostile . '{"a' 0 && hostile . '{"a\' 0 && hostile . "{\"__metadata__\":$one}" 0 &&
  hostile . '{"data_offsets"' 0 && hostile . '{"data_offsets":' 0 &&
  hostile 'no tensors|not a saved state' '{}' 0 &&
  hostile 'no tensors|not a saved state' '{"__metadata__":{"step":"1"}}' 0 &&
  hostile . "{\"a\":$(printf '%030000d' 0 | tr 0 '[')" 0 &&                       # a nesting bomb
  hostile . "{\"a\":$(printf '%05000d' 0 | sed 's/0/{"a":/g')" 0
}
broken_files() {   # where not even the length is right
  : >evil/model.safetensors && refuse_evil 'truncated' &&
  printf 'abc' >evil/model.safetensors && refuse_evil 'truncated' &&
  printf '\377\377\377\377\377\377\377\377{}' >evil/model.safetensors && refuse_evil 'header' &&
  printf '\0\0\0\0\0\0\0\200{}' >evil/model.safetensors && refuse_evil 'header' &&
  printf '\3\0\0\0\0\0\0\0{}' >evil/model.safetensors && refuse_evil 'header' &&
  head -c 3000 /dev/zero >evil/model.safetensors && refuse_evil 'no tensors' &&
  cat text >evil/model.safetensors && refuse_evil 'header' &&
  size=$(wc -c <run/model.safetensors) || return 1
  for n in 1 7 8 9 100 1000 2000 5000 $((size - 1)); do
    head -c $n run/model.safetensors >evil/model.safetensors && refuse_evil . || return 1
  done
  rm -f evil/model.safetensors; mkdir evil/model.safetensors || return 1
  refuses . last --eval --out evil; code=$?; rmdir evil/model.safetensors; return $code
}
not_this_model() {   # good files that are not the model that config.json speaks of
  mkdir -p other
  alter() {   # PATTERN SED-SCRIPT
    cp run/config.json other
    edit run/model.safetensors other/model.safetensors "$2" &&
    refuses "$1" last --eval --out other && refuses "$1" text --init other --out other2 || return 1
    edit run/state.safetensors other/state.safetensors "$2" &&
    refuses "$1" text --out other --resume
  }
  alter 'no tensor transformer.wpe' 's/wpe\.weight/wpx.weight/' &&
  alter 'no tensor transformer.h.0.mlp.c_fc.bias' 's/mlp.c_fc.bias/mlp.c_fd.bias/' &&
  alter 'shape .8,256., expected .256,8.' 's/\[256,8\]/[8,256]/' &&
  alter 'shape .2,4., expected' 's/\[8\]/[2,4]/' &&
  alter 'two tensors' 's/ln_f\.bias/ln_f.weight/' &&
  alter 'I32' 's/F32/I32/'
}
configs() {
  rm -rf other; mkdir other; cp run/*.safetensors other
  config() {   # PATTERN SED-SCRIPT
    sed "$2" run/config.json >other/config.json &&
    refuses "$1" last --eval --out other && refuses "$1" text --init other --out other2
  }
  rm -f other/config.json
  refuses 'No such file' last --eval --out other && refuses 'No such file' text --init other &&
  config 'no n_layer' /n_layer/d && config 'no vocab_size' /vocab_size/d &&
  config 'n_embd' 's/"n_embd": 8/"n_embd": 0/' && config 'n_embd' 's/"n_embd": 8/"n_embd": -8/' &&
  config 'n_head' 's/"n_head": 2/"n_head": 3/' && config 'n_embd' 's/"n_embd": 8/"n_embd": 8.5/' &&
  config 'n_embd' 's/"n_embd": 8/"n_embd": "8"/' && config 'gelu_new' s/gelu_new/relu/ &&
  config 'model_type' 's/"gpt2"/"llama"/' && config 'epsilon' s/1e-05/1e-06/ &&
  config 'tie_word' '/tie_word/s/true/false/' && config 'scale_attn_weights' '/weights/s/true/false/' &&
  config 'reorder' '/reorder/s/false/true/' && config 'cross' '/cross/s/false/true/' &&
  config 'inverse' '/inverse/s/false/true/' && config 'two models' 's/"n_embd": 8/"n_embd": 16/' &&
  config 'two models' 's/"n_head": 2/"n_head": 1/' &&
  config 'n_layer' 's/"n_layer": 1/"n_layer": 10000000/' &&
  config 'two models' 's/"n_layer": 1/"n_layer": 1000/' &&
  config 'n_embd' 's/"n_embd": 8/"n_embd": 9999998/' &&
  config 'n_positions' 's/"n_positions": 8/"n_positions": 9999999/' &&
  config 'token is a byte' 's/"vocab_size": 256/"vocab_size": 9999999/' &&
  config 'n_layer' 's/"n_layer": 1/"n_layer": 99999999999999999999/' || return 1
  head -c 100 /dev/zero >other/config.json && refuses 'no n_layer' last --eval --out other &&
  : >other/config.json && refuses 'no n_layer' last --eval --out other
}
resumes() {
  rm -rf none; mkdir none
  refuses 'No such file' text --out none --resume &&
  refuses 'No such file' text --out no --resume &&
  refuses 'n_embd' text --out run --resume --n_embd 16 &&
  refuses 'n_layer' text --out run --resume --n_layer 2 &&
  refuses 'block_size' text --out run --resume --block_size 4 &&
  refuses 'n_head' text --out run --resume --n_head 1 &&
  refuses 'optimizer' text --out run --resume --optimizer sgd &&
  refuses 'another text' last --out run --resume --block_size 8 || return 1
  for value in -5 x '' 1e9 99999999999999999999; do
    mkdir -p other && edit run/state.safetensors other/state.safetensors \
      "s/\"step\":\"60\"/\"step\":\"$value\"/" && refuses step text --out other --resume ||
      return 1
  done
  for change in 's/"n_embd":"8"/"n_embd":"99999999"/' 's/"n_embd":"8"/"n_embd":"-8"/' \
    's/"n_embd":"8"/"n_embd":"16"/' 's/"n_layer":"1"/"n_layer":"0"/' 's/"adamw"/"none"/' \
    's/"n_head":"2"/"n_head":"3"/' 's/"step":"60",//' \
    's/"text":"text"/"text":"no\/such"/'; do
    edit run/state.safetensors other/state.safetensors "$change" &&
      refuses . --out other --resume || return 1
  done
  untouched
}
checkpoint_list() {
  check "$1hostile headers: holes, overlaps, overflows, nesting bombs, no JSON" hostile_headers
  check "$1files cut short, empty, or of something else" broken_files
  check "$1checkpoints of another model: names, shapes, types" not_this_model
  check "$1config.json missing, damaged, absurd" configs
  check "$1--resume with other sizes, another text, no save, a damaged state" resumes
}
checkpoint_list "refuses "

# ---- Where the output goes

closed() {
  "$train" text $small --max_steps 5 --eval_interval 2 --out closed >&- 2>/dev/null
  "$train" last --eval --out closed >closed.txt || return 1   # whatever it said, the model is whole
  grep '^loss' closed.txt || return 1
  "$train" text $small --max_steps 9 --out closed --resume <&- >&- 2>&-
  "$train" last --eval --out closed | grep '^loss'
}
check "closed stdin, stdout and stderr: nothing strange in the files" closed
if [ -c /dev/full ]; then
  full_out() { for w in --help "last --eval --out run"; do "$train" $w >/dev/full && return 1; done
               return 0; }
  check "output that cannot be written (/dev/full) is an error" full_out
fi
broken_pipe() {
  go --max_steps 300 --eval_interval 1 --out pipe | head -1
  [ ! -f pipe/model.safetensors ] || "$train" last --eval --out pipe | grep '^loss'
}
check "a reader that goes away (| head -1) leaves a checkpoint that opens, or none" broken_pipe
check "1000 threads, or a line that says there are fewer" \
  eval '"$train" text $small --threads 1000 --max_steps 1 --eval_interval 0 --out many ||
        refuses "threads" text $small --threads 1000 --max_steps 1 --out many'

# ---- The default text

tales_good() {
  "$tales" a --bytes 5000 --seed 3 && "$tales" b --bytes 5000 --seed 3 && cmp a b &&
  cmp a.floor b.floor && [ "$(wc -c <a)" = 5000 ] && grep '^bytes 5000$' a.floor &&
  "$tales" b --bytes 5000 --seed 4 && ! cmp a b && "$tales" --check --bytes 20000 &&
  "$tales" --check --seed 9 --bytes 100 && "$tales" --help
}
check "tales: the same seed gives the same bytes, --check passes" tales_good
tales_bad() {
  "$tales" a --bytes 5000 && cp a a.kept || return 1
  for options in '' '--bytes' 'c --bytes 99' 'c --bytes -1' 'c --bytes x' 'c --bytes 1e6' 'c d' \
    'c --seed' 'c --seed -1' 'c --seed 18446744073709551616' '--chek' 'c --check' 'c --nonsense 3' \
    '/no/such/folder/c' 'folder' '/dev/null/x' 'c --bytes 2000000000'; do
    "$tales" $options >out.txt 2>err.txt
    code=$?
    if [ $code = 0 ] || [ $code -gt 125 ] || [ "$(wc -l <err.txt)" != 1 ]; then
      echo "tales $options: exit code $code"; cat err.txt; return 1
    fi
  done
  (trap '' XFSZ; ulimit -f 8; "$tales" a --bytes 50000 2>/dev/null) && return 1
  cmp a a.kept && clean . && [ ! -e c ]
}
check "tales: refuses bad options with one line, keeps the old file on a full disk" tales_bad

# ---- The same under the sanitizers

wait
if [ "${SANITIZE:-yes}" = yes ]; then
  if [ -x asan ] && [ -x tsan ] && [ -x fuzz ]; then
    train=$tmp/asan
    asan_run() {
      go --max_steps 12 --eval_interval 4 --accumulate 2 --threads 3 --out asan1 || return 1
      go --max_steps 16 --resume --out asan1 && go --compare 2 --max_steps 6 --out asan1 &&
      go --n_embd 20 --n_head 2 --block_size 70 --batch_size 3 --max_steps 2 --out asan1 &&
      go --n_embd 517 --n_head 1 --block_size 270 --batch_size 1 --max_steps 1 --eval_interval 0 --out asan1 &&
      go --n_embd 384 --n_head 1 --block_size 270 --batch_size 1 --max_steps 1 --eval_interval 0 --out asan1 &&
      go --n_layer 8 --max_steps 1 --out asan8 &&
      go --n_layer 8 --max_steps 2 --out asan8 --resume   # 300 tensors
    }
    check "address and undefined-behaviour sanitizer: a run, resumed, and --compare" asan_run
    check "address sanitizer: odd texts" odd
    check "address sanitizer: odd sizes" sizes
    check "address sanitizer: the hub's layout" hub
    checkpoint_list "address sanitizer: refuses "
    check "address sanitizer: 300 mutated checkpoints are refused with a line, or opened" \
      ./fuzz "$tmp/asan" run text 300
    check "thread sanitizer: a run on 3 threads" \
      eval './tsan text $small --threads 3 --max_steps 6 --eval_interval 3 --out tsan1 2>tsan.txt &&
            [ ! -s tsan.txt ]'
  else check "sanitizer builds" eval 'cat asan.log tsan.log; false'; fi
fi

echo "$passed passed, $failed failed"
[ $failed = 0 ]
