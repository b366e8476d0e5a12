// tales.c writes short tales from a grammar, and knows exactly the entropy of what it wrote.
//
// A language model can never, on average, spend fewer nats on a text than -log p(text), p being
// the probability with which the text came about. For Shakespeare nobody knows p. Here every byte
// is either forced (it costs nothing) or comes from a choice with known odds, so we add up the cost
// as we write: that is the floor which the loss of a model approaches and cannot pass, unless it
// is asked about a text that it has learnt by heart.
//
// THE INVARIANT. p(text) is the product of the odds of the choices only if no second series of
// choices gives the same text. So: let the head of an alternative be its text up to the next choice
// inside it. Wherever a choice is made, no head is the beginning of another. Then the bytes that
// follow single out one alternative, then the next, and the text is decoded from left to right
// without ever looking ahead. "An optional adjective" breaks this ("the " begins "the red "), and
// so do two first names such as Ann and Anna: choose() would stop and name them.
//
// THE ACCOUNT. Of n equally likely heads, `before` still agree with the bytes written so far, and
// `after` of them agree with the next byte too: that byte costs log(before / after) nats. This is
// -log p(byte | all bytes before it), so any part of the text, cut anywhere, has its exact floor.
//
// THE PROOF. Each text is read back by the same code with the dice put away: each choice is the one
// head that agrees with the bytes in hand. The account must be the same to the last bit.
//
//     cc -O2 -o tales data/tales.c -lm && ./tales data/tales.txt
//
// writes data/tales.txt, and data/tales.txt.floor with the floor of its first 90 % (train) and of
// the rest (val). The same seed gives the same bytes everywhere.

#include <ctype.h>
#include <errno.h>
#include <math.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

// ---------------------------------------------------------------------------------------------
// 1. The grammar
//
//     |  between the alternatives of a rule, all equally likely
//     /  between the forms of a word: 0 is the first, as in  Nell/she/her/her
//     [said]     choose an alternative of the rule "said", and tell it
//     [A=name]   the same, and A stands for it until the end of the tale; what a letter stands
//                for is not chosen again, so two people of a tale never share a name
//     [A] [A1]   tell again what A stands for: form 0, form 1
//     [A=name1]  choose, but tell form 1
//     [a J=adj]  with its article, "a red" or "an old"        [^A1]  with a capital
//
// In every tale A is the hero, M the mood, R the trade, T the town. Small letters belong to
// phrases: telling [W] again would tell the [b=animal] inside that proverb again. There are few
// words, so that a small model knows them after a minute; what takes it longer is to agree: the
// name, the pronoun, the kettle that was lost and is found.

typedef struct { const char *name, *alternatives; } Rule;

static const Rule grammar[] = {
{"tale", "[opening] [when] [plot] [ending]\n\n"},

{"opening",
    "Once upon a time [a M=mood] [R=trade] named [A=name] lived in [T=town].|"
    "Long ago there was [a M=mood] [R=trade] in [T=town] called [A=name].|"
    "In [T=town] everybody knew [A=name], the [M=mood] [R=trade]."},

{"plot",
    // lost and found
    "[A] lost [A3] [J=adj] [X=thing]. [^A1] looked [where] and [where]. Then [A1] met [a mood] "
    "[U=animal]. 'I kept the [J] [X] for you,' [said] the [U]. So [A] gave the [U] [food].|"

    // a trade
    "[A] took [a J=adj] [X=thing] to the [P=place]. There [A1] met [B=name], who gave [A2] "
    "[a K=adj] [Y=thing] for the [X]. 'What will you do with [a K] [Y]?' [said] [A3] [kin]. "
    "'I will give it to [a mood] [animal],' [said] [A].|"

    // a race
    "[A] and [a N=mood] [U=animal] ran a race to the [P=place]. The prize was [a J=adj] [X=thing]. "
    "But the [N] [U] stopped for [food], and so [A] won the [J] [X]. '[^W=proverb],' [said] the "
    "[U].|"

    // stone soup
    "[A] had nothing to eat, so [A1] boiled [a J=adj] [X=thing] at the [P=place]. [B=name] brought "
    "[E=food], and [a mood] [U=animal] brought [F=food]. 'What [a mood] soup of [E] and [F]!' "
    "[said] [B]. And [A] dried the [J] [X]."},

{"ending",
    "[A] went home and [did], as always.|"
    "That is why they say in [T]: '[^w=proverb].'|"
    "And [A] the [R] was never so [M] again.|"
    "That night all of [T] [did]."},

{"proverb", "it takes [a m=mood] [b=animal] to find [a c=adj] [d=thing]|"
    "no [d=thing] without [e=food]|even [a b=animal] was once [m=mood]"},
{"when", "One morning|On a windy day|Late one night|On the first of May"},
{"did", "sang|danced|slept well|ate [food]"},
{"where", "[under] the [bed]"},
{"name", "Nell/she/her/her|Tom/he/him/his|Mira/she/her/her|Hugo/he/him/his|Rosa/she/her/her|"
    "Finn/he/him/his|Ida/she/her/her|Omar/he/him/his"},
{"mood", "cheerful|shy|stubborn|proud|clever|hungry"},
{"trade", "miller|baker|tailor|weaver|sailor|gardener"},
{"town", "Thornby|Applewick|Coldwater|Goosefield|Mossbridge"},
{"adj", "red|old|silver|tiny|blue|golden"},
{"thing", "kettle|lantern|fiddle|umbrella|key|clock"},
{"place", "harbour|mill|market|bridge|orchard"},
{"animal", "fox|owl|goat|crow|hedgehog|toad"},
{"food", "bread|cheese|honey|plums|walnuts|turnips"},
{"under", "under|behind|inside|below"},
{"bed", "bed|stove|piano|roof|sofa"},
{"said", "said|cried|whispered|sighed"},
{"kin", "mother|father|uncle|aunt"},
};

// ---------------------------------------------------------------------------------------------
// 2. Telling: one walk through the grammar, to write a text and to read it back

enum { MAX_WAYS = 32, MAX_HEAD = 256 };

typedef struct {
    char *text;
    size_t size, train, at;     // the first `train` bytes are for training; `at` are told so far
    int reading;                // the text makes the choices, not the dice
    uint64_t dice;
    double nats[2];             // the account: of the training part, of the rest
    const char *word[128];      // the alternative that each letter stands for in this tale
} Teller;

typedef struct { int capital, article, letter, form; char rule[16]; } Slot; // 0 and "": none

static _Noreturn void die(const char *format, ...) {
    va_list args;
    va_start(args, format);
    fputs("tales: ", stderr);
    vfprintf(stderr, format, args);
    fputs("\n", stderr);
    va_end(args);
    exit(1);
}

// splitmix64 (Steele, Lea, Flood 2014). Throwing again in the incomplete last round of n makes
// the odds exactly 1/n.
static int throw_dice(uint64_t *state, int sides) {
    uint64_t n = (uint64_t)sides, x;
    do {
        x = *state += 0x9e3779b97f4a7c15u;
        x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9u;
        x = (x ^ x >> 27) * 0x94d049bb133111ebu;
        x ^= x >> 31;
    } while (x >= UINT64_MAX - UINT64_MAX % n);
    return (int)(x % n);
}

static int begins(const char *s, const char *with) { return !strncmp(s, with, strlen(with)); }
static int ends(const char *s) { return *s == '\0' || *s == '|' || *s == '/'; }

static const char *find_rule(const char *name) {
    for (size_t r = 0; r < sizeof grammar / sizeof *grammar; r++)
        if (!strcmp(grammar[r].name, name)) return grammar[r].alternatives;
    die("grammar: there is no rule [%s]", name);
}

static const char *find_form(const char *word, int form) {
    for (const char *s = word; form > 0; form--, word = ++s) {
        s += strcspn(s, "/|");
        if (*s != '/') die("grammar: too few forms: %.20s", word);
    }
    return word;
}

// Reads "[^a A=rule1]" at s, where all but A or the rule may be missing. Returns what follows.
static const char *read_slot(const char *s, Slot *slot) {
    const char *start = s++;
    memset(slot, 0, sizeof *slot);
    if (*s == '^') slot->capital = 1, s++;
    if (begins(s, "a ")) slot->article = 1, s += 2;
    if (!islower((unsigned char)s[1])) slot->letter = *s++ & 127;   // rules have longer names
    if (*s == '=') s++;
    for (size_t n = 0; islower((unsigned char)*s) && n + 1 < sizeof slot->rule; n++)
        slot->rule[n] = *s++;
    if (isdigit((unsigned char)*s)) slot->form = *s++ - '0';
    if (*s != ']') die("grammar: cannot read %.20s", start);
    return s + 1;
}

// Appends to head the text of s, which stands in that slot, up to the next choice or to the end
// of the alternative; returns where it stopped. A letter becomes what it stands for, and what is
// told again tells its own choices again.
static const char *read_head(Teller *t, const Slot *in, const char *s, int again, char *head) {
    size_t start = strlen(head);
    if (in->article) strcat(head, strchr("aeiou", *s) ? "an " : "a ");
    while (!ends(s)) {
        size_t n = strlen(head);
        if (n + 8 > MAX_HEAD) die("grammar: a head is too long: %s", head);
        if (*s == '[') {
            Slot slot;
            const char *next = read_slot(s, &slot);
            if (slot.rule[0] && !again) break;
            if (!t->word[slot.letter]) die("grammar: not chosen yet: %.20s", s);
            read_head(t, &slot, find_form(t->word[slot.letter], slot.form), 1, head);
            s = next;
        } else {
            head[n] = *s++;
            head[n + 1] = '\0';
        }
    }
    if (in->capital) head[start] = (char)toupper((unsigned char)head[start]);
    return s;
}

// Tells one byte, or compares it with the text in hand, and enters its cost in the account.
static void tell(Teller *t, char byte, double cost) {
    if (t->at == t->size) return;               // the last tale is cut
    if (!t->reading) t->text[t->at] = byte;
    if (t->text[t->at] != byte) die("check: byte %zu is not what the grammar says", t->at);
    t->nats[t->at >= t->train] += cost;
    t->at++;
}

// The alternative to take: thrown by the dice or, reading, the one whose head comes next.
static int pick(Teller *t, int ways, char heads[][MAX_HEAD]) {
    if (!t->reading) return throw_dice(&t->dice, ways);
    for (int k = 0; k < ways; k++) {
        size_t n = strlen(heads[k]), left = t->size - t->at;
        if (!memcmp(heads[k], t->text + t->at, n < left ? n : left)) return k;
    }
    die("check: the grammar knows no way to go on at byte %zu", t->at);
}

static void expand(Teller *t, const char *s);

// Every choice of a text is made here, and paid for here.
static void choose(Teller *t, const Slot *slot) {
    char heads[MAX_WAYS][MAX_HEAD];
    const char *start[MAX_WAYS], *rest[MAX_WAYS];
    int ways = 0;
    for (const char *s = find_rule(slot->rule), *bar; s; s = bar ? bar + 1 : NULL) {
        int used = 0;
        for (int c = 'A'; c <= 'z'; c++) used |= t->word[c] == s;
        bar = strchr(s, '|');
        if (used) continue;
        if (ways == MAX_WAYS) die("grammar: [%s] has too many alternatives", slot->rule);
        heads[ways][0] = '\0';
        start[ways] = s;
        rest[ways] = read_head(t, slot, find_form(s, slot->form), 0, heads[ways]);
        ways++;
    }
    if (!ways) die("grammar: nothing is left of [%s]", slot->rule);

    int k = pick(t, ways, heads), before = ways;
    for (int i = 0; i < ways; i++)              // the invariant
        if (i != k && (begins(heads[i], heads[k]) || begins(heads[k], heads[i])))
            die("grammar: in [%s], '%s' and '%s' begin alike", slot->rule, heads[i], heads[k]);
    for (size_t n = 0; heads[k][n]; n++) {      // the account
        int after = 0;
        for (int i = 0; i < ways; i++) after += !strncmp(heads[i], heads[k], n + 1);
        tell(t, heads[k][n], log((double)before / after));
        before = after;
    }
    if (slot->letter) t->word[slot->letter] = start[k];
    expand(t, rest[k]);
}

static void expand(Teller *t, const char *s) {
    for (;;) {
        char head[MAX_HEAD] = "";
        Slot slot = { 0 };
        s = read_head(t, &slot, s, 0, head);
        for (int n = 0; head[n]; n++) tell(t, head[n], 0.0);    // no choice, no cost
        if (ends(s)) return;
        s = read_slot(s, &slot);
        choose(t, &slot);
    }
}

static void tell_tales(Teller *t) {
    while (t->at < t->size) {
        memset(t->word, 0, sizeof t->word);
        expand(t, "[tale]");
    }
}

// ---------------------------------------------------------------------------------------------
// 3. Files and options

static int write_file(const char *name, const char *data, size_t size) {
    FILE *file = fopen(name, "wb");
    if (!file) return 0;
    int good = fwrite(data, 1, size, file) == size && fflush(file) == 0;
    return fclose(file) == 0 && good;
}

static char *join(const char *a, const char *b) {
    char *s = malloc(strlen(a) + strlen(b) + 1);
    if (!s) die("out of memory");
    return strcat(strcpy(s, a), b);
}

// Both files are complete under temporary names before either gets its own: a full disk or a
// Ctrl-C leaves no half file, and no text next to the floor of another one.
static void write_files(const char *path, const char *text, size_t size, const char *lines) {
    char *floor_path = join(path, ".floor");
    char *tmp = join(path, ".tmp"), *floor_tmp = join(floor_path, ".tmp");
    int good = write_file(tmp, text, size) && write_file(floor_tmp, lines, strlen(lines));
    if (good) {
        remove(floor_path);
        good = rename(tmp, path) == 0 && rename(floor_tmp, floor_path) == 0;
    }
    int error = errno;
    if (!good) remove(tmp), remove(floor_tmp);
    free(floor_path), free(tmp), free(floor_tmp);
    if (!good) die("cannot write %s and %s.floor: %s", path, path, strerror(error));
}

static uint64_t number(const char *option, const char *value, uint64_t low, uint64_t high) {
    char *end = NULL;
    errno = 0;
    uint64_t n = value && isdigit((unsigned char)*value) ? strtoull(value, &end, 10) : 0;
    if (!end || *end || errno || n < low || n > high)
        die("%s needs a whole number from %llu to %llu, not '%s'", option,
            (unsigned long long)low, (unsigned long long)high, value ? value : "");
    return n;
}

static const char usage[] =
    "usage: tales OUT [--bytes N] [--seed S]       write tales to OUT, their entropy to OUT.floor\n"
    "       tales --check [--bytes N] [--seed S]   write nothing, prove that the text tells\n"
    "                                              every choice\n"
    "  --bytes N   size of the text, 100 to 1000000000 (default 1000000)\n"
    "  --seed S    which tales, 0 to 18446744073709551615 (default 7)\n";

// Writes the tales in memory, proves them, and saves them unless out is NULL.
static void run(const char *out, size_t bytes, uint64_t seed) {
    Teller writer = { .size = bytes, .train = (size_t)((uint64_t)bytes * 9 / 10), .dice = seed };
    writer.text = malloc(bytes);
    if (!writer.text) die("no memory for %zu bytes", bytes);
    Teller reader = writer;
    reader.reading = 1;
    tell_tales(&writer);
    tell_tales(&reader);
    if (memcmp(writer.nats, reader.nats, sizeof writer.nats))
        die("check: wrote %.9f + %.9f nats, but read %.9f + %.9f", writer.nats[0],
            writer.nats[1], reader.nats[0], reader.nats[1]);

    double train = writer.nats[0] / (double)writer.train;
    double val = writer.nats[1] / (double)(bytes - writer.train);
    char lines[128];
    snprintf(lines, sizeof lines, "bytes %zu\ntrain_nats_per_byte %.9f\nval_nats_per_byte %.9f\n",
             bytes, train, val);
    if (out) write_files(out, writer.text, bytes, lines);
    printf("%s: %zu bytes, floor %.4f nats per byte (train), %.4f (val), every choice decoded\n",
           out ? out : "check", bytes, train, val);
    free(writer.text);
}

int main(int argc, char **argv) {
    const char *out = NULL;
    int check = 0, help = 0;
    uint64_t bytes = 1000000, seed = 7;
    for (int i = 1; i < argc; i++) {            // argv[argc] is NULL, which number() reports
        const char *arg = argv[i];
        if (!strcmp(arg, "--help")) help = 1;
        else if (!strcmp(arg, "--check")) check = 1;
        else if (!strcmp(arg, "--bytes")) bytes = number(arg, argv[++i], 100, 1000000000);
        else if (!strcmp(arg, "--seed")) seed = number(arg, argv[++i], 0, UINT64_MAX);
        else if (*arg == '-' || out) die("unexpected argument %s; see --help", arg);
        else out = arg;
    }
    if (help) fputs(usage, stdout);
    else if (!out == !check) die("give either a file to write or --check; see --help");
    else run(out, (size_t)bytes, seed);
    if (fflush(stdout) != 0) die("cannot write to standard output: %s", strerror(errno));
    return 0;
}
