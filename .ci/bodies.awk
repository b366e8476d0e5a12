# awk -v names="F G" -v shown=PATH -f .ci/bodies.awk THEIRS OURS
# Prints the source OURS, with the bodies of the functions F and G as they are in THEIRS, and nothing
# else of THEIRS: the signature, too, is ours. #line says where each body comes from: THEIRS is shown
# as PATH. Refuses what would make a verdict worthless: see forbidden below, and the README.
BEGIN {
  split(names, list, " ")
  for (i in list) wanted[list[i]] = 1
  n = split("asm __asm __asm__ __attribute __attribute__ _Pragma extern exit _exit _Exit quick_exit " \
    "abort raise kill tgkill signal sigaction longjmp siglongjmp atexit on_exit system popen fork " \
    "vfork clone syscall dlopen dlsym mmap mprotect open openat creat fopen freopen fdopen read " \
    "pread fread fgets getchar getc fgetc scanf fscanf getline getenv setenv putenv environ stdin " \
    "dup dup2 ptrace remove unlink rename main err errx verr verrx error opt count_verdict " \
    "gpu self in_hook areas area_of_code block_barrier", list, " ")
  for (i = 1; i <= n; i++) forbidden[list[i]] = 1
  n = split("thread shown warp_barrier arguments device_memory_map the_stream recorded shared_area " \
    "counts_traffic spots counts groups report watch wait_at change_fiber run_block run_grid " \
    "run_until enqueue gpu_die find_area shared_begin shared_end end_watch", list, " ")
  for (i = 1; i <= n && source == "train_gpu.cu"; i++) emulator[list[i]] = 1
  ours = ARGV[2]
}

# The function whose definition, or prototype, begins in this line; or ""
function begins(line,   name) {
  if (line ~ /^[A-Za-z]/)
    for (name in wanted) if (line ~ ("(^|[ *])" name "[(]")) return name
  return ""
}

function refuse(line, what) {
  printf "%s:%d: %s\n", shown, line, what >"/dev/stderr"
  refused = 1
  exit 1
}

# Reads one line of a body as a compiler does. `state` is CODE, or in which comment, string or
# character constant the line before it has ended; `depth` counts open braces.
function scan(text,   i, c, two, word, before) {
  for (i = 1; i <= length(text); i++) {
    c = substr(text, i, 1); two = substr(text, i, 2)
    if (state == "comment") {
      if (two == "*/") { state = "code"; i++ }
    } else if (state == "code") {
      if (two == "//") break
      if (two == "/*") { state = "comment"; i++ }
      else if (c == "#" || two == "%:" || two == "??")
        refuse(FNR, "preprocessor directives are not judged: write this without " two)
      else if (two == "<%" || two == "%>") refuse(FNR, "write { and } for " two)
      else if (c ~ /[A-Za-z_]/) {
        match(substr(text, i), /^[A-Za-z_0-9]*/)
        word = substr(text, i, RLENGTH)
        i += RLENGTH - 1
        if (word ~ /^atomic[A-Z]/)
          refuse(FNR, "`" word "`: atomic additions come in any order, and so do their rounding errors: " \
                 "let one thread add, in a fixed order (see the rules at the top of the file)")
        if (word in emulator) refuse(FNR, "`" word "` is a name of the emulator: choose another one")
        if (word in forbidden || word ~ /^(exec|posix_spawn|pthread_|__builtin_|__iso)|_unlocked$/)
          refuse(FNR, "`" word "` is not for a solution: it computes, and leaves the rest to the program")
        if (substr(text, i + 1, 1) ~ /["']/)
          refuse(FNR, "a quote directly behind `" word "`: write it without this prefix")
      } else if (c ~ /[0-9]/ && substr(text, i + 1, 1) == "'")
        refuse(FNR, "a quote in a number: write it without")
      else if (c == "\"" || c == "'") quote = state = c
      else if (c == "{") depth++
      else if (c == "}" && --depth < 0) refuse(FNR, "this } closes the function: one { is missing")
    } else if (c == "\\") i++
    else if (c == quote) state = "code"
  }
  if (text ~ /\\[ \t\f\v]*$/) refuse(FNR, "a line that ends in a backslash: join it with the next one")
  if (state == "\"" || state == "'") refuse(FNR, "a " state " is not closed")
}

FNR == 1 { part = "" }
{ sub(/\r$/, "") }
part == "" && begins($0) != "" { name = begins($0); part = "signature" }
part == "signature" && FILENAME != ours && /\{/ && !/\{[ ]*(\/\/.*)?$/ {
  refuse(FNR, "code follows the { of " name "(): begin its body on the next line")
}
part == "signature" && /;[ ]*(\/\/.*)?$/ { part = "" }        # only a prototype
part == "signature" && /\{[ ]*(\/\/.*)?$/ {
  part = "body"; state = "code"; depth = 0
  if (FILENAME == ours) { print; printf "#line %d \"%s\"\n%s", start[name], shown, body[name] }
  else { start[name] = FNR + 1; body[name] = "" }
  next
}
part == "body" && /^}/ {
  if (FILENAME == ours) printf "#line %d \"%s\"\n", FNR, source
  else if (state != "code" || depth) refuse(FNR, name "() ends here, with an open " (depth ? "{" : state))
  else complete[name] = 1
  part = ""
}
FILENAME != ours {
  if (part == "body") { scan($0); body[name] = body[name] $0 "\n" }
  next
}
FNR == 1 {
  for (name in wanted)
    if (!(name in complete)) {
      printf "%s: there is no function %s() that begins and ends at the start of a line\n", shown, name \
        >"/dev/stderr"
      exit 1
    }
  part = ""
}
part != "body" { print }
