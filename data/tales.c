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
//     [G=do1]    choose, but tell form 1
//     [a J=adj]  with its article, "a red" or "an old"        [^A1]  with a capital
//
// In every tale A is the hero, R the trade, M the mood, T the town, G H and g h two habits. Small
// letters belong to phrases: telling [W] again tells the [b=animal] inside that proverb again.

typedef struct { const char *name, *alternatives; } Rule;

static const Rule grammar[] = {
{"tale", "[opening] [custom] [when] [plot] [ending]\n\n"},

{"opening",
    "Once upon a time [a M=mood] [R=trade] named [A=name] lived in [T=town].|"
    "Once there was [a M=mood] [R=trade] in [T=town] called [A=name].|"
    "Once, in [T=town], there lived [a M=mood] [R=trade] by the name of [A=name].|"
    "Long ago the only [R=trade] in [T=town] was [A=name], [a M=mood] soul.|"
    "In [T=town] everybody knew [A=name], the [M=mood] [R=trade].|"
    "Nobody in [T=town] was as [M=mood] as [A=name] the [R=trade]."},

{"custom",
    "Every morning [A1] [G=do1] [H=what] and [g=do1] [h=what].|"
    "[^A1] [G=do1] [H=what], [g=do1] [h=what] and [do1] [what].|"
    "Some said [A1] [G=do1] [H=what], others that [A1] [g=do1] [h=what]."},

{"plot",
    // lost and found
    "[A] could not find [A3] [J=adj] [X=thing]. [^A1] looked [where] and [where]. [B=name] the "
    "[S=trade] had only seen [a K=adj] [Y=thing] [where].\n"
    "'[^W=proverb],' [said] [B][how]\n"
    "So [A] walked to the [P=place]. There sat [a mood] [U=animal] with the [J] [X].\n"
    "'I kept it [kept] for you,' [said] the [U][how]\n"
    "[A] gave the [U] [a adj] [thing] and [food], and carried the [J] [X] back to [T].|"

    // a chain of trades
    "[A] took [a J=adj] [X=thing] to market. At the [P=place] [A1] met [B=name] the [S=trade], who "
    "gave [A2] [a K=adj] [Y=thing] for it. [C=name] gave [A2] [a L=adj] [Z=thing] for the [Y]. And "
    "the [Z] went for [F=food].\n"
    "'Where is the [J] [X]?' [said] [A3] [kin][how]\n"
    "'[^F],' [said] [A], and [felt].\n"
    "Then [B] knocked. 'The [X] is too [fault],' [said] [B][how] So it came back to [T].|"

    // a riddle contest
    "[A] came to the [P=place], where [a mood] [U=animal] let nobody pass.\n"
    "'[I=riddle]' [said] the [U][how]\n"
    "'[^a K=adj] [Y=thing],' [said] [A]. The [U] [felt] and took [A3] [E=food].\n"
    "'[^a L=adj] [Z=thing],' [said] [A]. The [U] [felt] and took [A3] [F=food].\n"
    "[A] thought of [what]. '[^I1]!' [A1] [said][how]\n"
    "The [U] gave back the [E] and the [F] and let [A2] pass. Now they ask in [T]: '[I]' And every "
    "child [said1]: '[^I1]!'|"

    // a race
    "[A] and [a mood] [U=animal] ran a race from the [P=place] to the [Q=place]. [B=name] the "
    "[S=trade] held the prize, [a J=adj] [X=thing]. [A] ran like [a adj] [Y=thing], the [U] like "
    "[a adj] [Z=thing].\n"
    "'[^W=proverb],' [said] the [U][how]\n"
    "[winner]|"

    // a bargain with an animal
    "[A] found [a mood] [U=animal] [caught] near the [P=place].\n"
    "'Let me go,' [said] the [U], 'and you shall have [a J=adj] [X=thing]. But you must [V=do] "
    "[O=what].'\n"
    "'I will [V] [O],' [said] [A][how] The next day the [J] [X] lay [where]. [vow]|"

    // stone soup
    "[A] had nothing to eat, so [A1] boiled [a J=adj] [X=thing] at the [P=place].\n"
    "'What is that?' [said] [B=name] the [S=trade][how]\n"
    "'[^X] soup,' [said] [A]. 'It only lacks [E=food].' So [B] brought [E].\n"
    "Then came [C=name] with [a K=adj] [Y=thing] and [F=food]. Then came [a mood] [U=animal] with "
    "[a L=adj] [Z=thing] and [I=food]. The soup of [E], [F] and [I] was [taste].\n"
    "'And all from one [X]!' [said] [eater][how] [A] dried the [J] [X] and kept it [where].|"

    // stubborn weather
    "the [W=weather] came to [T] and would not leave. After [N=number] days [B=name] the [S=trade] "
    "shook [a J=adj] [X=thing] at it. It stayed. [C=name] offered it [F=food] and [I=food]. "
    "It stayed.\n"
    "'Dear [W], what do you want?' [said] [A][how]\n"
    "'[^a K=adj] [Y=thing],' [said] the [W]. 'In [N] days nobody asked.'\n"
    "[A] found the [K] [Y] [where]. The [W] [felt], took the [K] [Y] and left for [far], where it "
    "[do1] [what].|"

    // the one that is missing
    "[A] drove [N=number] [V=flock] from the [P=place] to the [Q=place]. On the way [A1] bought "
    "[a J=adj] [X=thing], [F=food] and [a K=adj] [Y=thing]. At the [Q] [A1] counted the [V]. There "
    "were only [N1]! [A] looked [where] and [where].\n"
    "'Only [N1] [V],' [said] [A] to [B=name] the [S=trade][how]\n"
    "'And what sits on your [X]?' [said] [B][how] [A] counted again. There were [N].|"

    // a message
    "[A] had to bring a message to [B=name] in [far]: '[^I=news].' So as not to forget it, [A1] "
    "told it to [a mood] [U=animal] at the [P=place]. '[^I],' [said] [A]. The [U] [felt].\n"
    "Then [A] fell over [a J=adj] [X=thing] and forgot every word.\n"
    "'Something about [a adj] [Y=thing],' [said] [A][how]\n"
    "But the [U] had come after [A2] with the [J] [X]. '[^I],' [said] the [U]. [B] [felt] and gave "
    "the [U] [food]."},

{"winner",
    "[A] came too late: at the [Q] the [U] sat on the [J] [X].\n'[^W],' it [said] again[how]|"
    "But the [U] stopped for [food], and so [A] won the [J] [X].\n'[^W],' [said] [B][how]"},

{"vow",
    "For [N=number] years [A] [V1] [O], and the [J] [X] never left [A2].|"
    "But soon [A] forgot to [V] [O], and the [J] [X] turned into [a K=adj] [Y=thing].|"
    "When [B=name] laughed at the [J] [X], [A] [felt]. But [A1] [V1] [O]."},

{"ending",
    "[A] went home and [G1] [H], as always.|"
    "From that day on [A1] [g1] [h] only on Sundays.|"
    "That is why they say in [T]: '[^w=proverb].'|"
    "Nobody in [T] believed it but [a mood] [trade].|"
    "And [A] the [R] was never so [M] again.|"
    "When they heard it in [T], the [trade] [felt] and the [trade] [felt].|"
    "And that night all of [T] [G1] [H]."},

{"how", ".| and [felt].|, then [do1] [what].|, eating [food].|, looking [where].|"
    ", holding [a adj] [thing].|, as [mood] as [a animal].| more [softly] than [a animal]."},
{"felt", "[feel] like [a mood] [animal]"},
{"proverb", "it takes [a m=mood] [b=animal] to [e=do] [f=what]|no [c=thing] without [d=food]|"
    "even [a b=animal] was once [m=mood]|who eats [d=food] must [e=do] [f=what]|"
    "one [c=thing] does not make [a b=animal] [m=mood]"},
{"news", "the [b=animal] has [i=eaten] the [c=thing]|hide the [d=food], the [j=trade] is coming|"
    "a certain [j=trade] wants to [e=do] [f=what]|there is [a b=animal] [k=under] the [l=bed]"},
{"town", "[t=half][u=tail]"},
{"where", "[under] the [adj] [bed]"},
{"when", "One morning|One evening|One Sunday|One foggy day|One market day|One winter|"
    "On a windy Tuesday|On the first of May|Late one night|Just before supper|"
    "In the year of the big snow|On the longest day"},
{"name", "Nell/she/her/her|Tom/he/him/his|Mira/she/her/her|Hugo/he/him/his|Ida/she/her/her|"
    "Otto/he/him/his|Rosa/she/her/her|Finn/he/him/his|Amara/she/her/her|Ravi/he/him/his|"
    "Yuki/she/her/her|Omar/he/him/his|Greta/she/her/her|Kofi/he/him/his|Vera/she/her/her|"
    "Emil/he/him/his|Zoe/she/her/her|Ben/he/him/his|Lena/she/her/her|Jack/he/him/his|"
    "Sofia/she/her/her|Paul/he/him/his|Wanda/she/her/her|Carl/he/him/his|Ines/she/her/her|"
    "Leo/he/him/his|Clara/she/her/her|Max/he/him/his|Judith/she/her/her|Tariq/he/him/his|"
    "Elsa/she/her/her|Sam/he/him/his"},
{"mood", "cheerful|elegant|shy|stubborn|sleepy|curious|proud|clever|hungry|polite|gloomy|impatient|"
    "wise|jealous|brave|idle"},
{"trade", "miller|baker|tailor|weaver|potter|cobbler|shepherd|sailor|gardener|clockmaker|beekeeper|"
    "lamplighter|carpenter|piper|postman|teacher"},
{"half", "Thorn|Apple|Cold|Nether|Salt|Goose|Pepper|Fern|Moss|Crow|Honey|Stone|Elder|Winter|Otter|"
    "Candle|Owl|Rain|Barley|Pudding"},
{"tail", "by|field|water|wick|marsh|gate|hill|bridge|ham|well"},
{"far", "Lisbon|Bergen|Samarkand|Timbuktu|Naples|Kyoto|Cork|Zanzibar|Lima|Oslo|Quebec|Bombay"},
{"do", "argue with/argued with|sing to/sang to|count/counted|paint/painted|write to/wrote to|"
    "dance with/danced with|salute/saluted|laugh at/laughed at|iron/ironed|whistle at/whistled at|"
    "knit socks for/knitted socks for|measure/measured|polish/polished|bow to/bowed to|"
    "read to/read to|bark at/barked at"},
{"what", "the onions|the moon|the kettles|every cow|snails|the newspaper|the geese|the rain|clouds|"
    "the hens|the north wind|a cabbage|ducks|the stairs|the mayor|both bulls"},
{"adj", "red|old|silver|crooked|tiny|blue|rusty|wooden|golden|enormous|squeaky|lucky|dented|"
    "striped|ugly|green|borrowed|sticky|velvet|hollow|purple|leaky|invisible|haunted"},
{"thing", "kettle|lantern|fiddle|umbrella|key|clock|spoon|button|drum|ladder|mirror|basket|whistle|"
    "boot|teapot|hat|compass|bell|pillow|trumpet|violin|shovel|candle|sock"},
{"place", "harbour|mill|market|well|lighthouse|crossroads|orchard|bridge|chapel|ferry|quarry|inn|"
    "river|town gate|smithy|windy hill"},
{"animal", "fox|owl|goat|crow|hedgehog|goose|badger|otter|donkey|toad|hare|tomcat|pig|swan|eel|"
    "robin"},
{"flock", "geese|goats|sheep|piglets|ducks|hens|calves|donkeys"},
{"food", "bread|cheese|honey|plums|walnuts|pickles|butter|dumplings|turnips|cake|onions|beans|"
    "leeks|barley|mushrooms|noodles"},
{"under", "under|behind|on|inside|below|beside|over|between the cat and"},
{"bed", "bed|stove|soup pot|roof|piano|flour bin|chimney|stairs|cheese|bath|beehive|cradle|"
    "wardrobe|haystack|sofa|wheelbarrow"},
{"number", "three/two|four/three|five/four|six/five|seven/six|eight/seven|nine/eight|ten/nine|"
    "eleven/ten|twelve/eleven"},
{"said", "said/says|cried/cries|whispered/whispers|sighed/sighs|muttered/mutters|sang/sings|"
    "grumbled/grumbles|shouted/shouts|giggled/giggles|growled/growls"},
{"softly", "softly|bravely|sweetly|slowly|gravely|hoarsely|kindly|proudly|sadly|politely|wisely"},
{"feel", "laughed|wept|turned pale|blushed|sneezed|nodded|bowed|yawned|smiled|shivered|coughed|"
    "danced"},
{"kept", "warm|dry|safe|polished|secret|well fed"},
{"kin", "mother|father|uncle|aunt|grandmother|brother"},
{"fault", "loud|small|heavy|clever|bright|honest"},
{"taste", "good|thick|hot|strange|the best in [T]|better than [food]"},
{"caught", "caught in a net|stuck in a jug|tied to a tree|asleep in a trap|locked in a barrel"},
{"weather", "rain|fog|snow|wind|frost|hail|thunder"},
{"eater", "[B]|[C]|the [U]"},
{"eaten", "eaten|married|sold|hidden|found|kissed|painted|stolen"},
{"riddle", "What has teeth and cannot bite?/a comb|What has hands and cannot clap?/a watch|"
    "What has an eye and cannot see?/a needle|What has a neck and no head?/a bottle|"
    "What runs and has no feet?/a stream|What gets wet while it dries?/a towel|"
    "What is full of holes and holds water?/a sponge|What breaks when you name it?/silence|"
    "What grows when you take from it?/a hole|What fills a room and weighs nothing?/light"},
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
