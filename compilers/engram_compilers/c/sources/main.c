/* Greedy decoding from the command line: token ids in, token ids out. */
#include "platform.h"

#include "engram.h"

#include <errno.h>
#include <limits.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <time.h>

#define DEFAULT_TOKENS 32
#define WRONG_USE 2

static const char usage[] =
    "usage: engram [-d FOLDER] [-n N] [--time] [--verify] [ID ...]\n"
    "Continue a text given as token ids, or as lines of them on standard input, and print the ids that follow.\n"
    "  -d FOLDER  where weights.bin and tables/ are (.)\n"
    "  -n N       how many ids to print at most (32); an id that ends the answer is the last one\n"
    "  --time     say afterwards how long it took and how much memory\n"
    "  --verify   compare all files with what was packed, and end\n";

typedef struct settings {
    const char *folder;
    long most;
    int time;
    int verify;
} settings;

typedef struct ids {
    int32_t *values;
    size_t count;
    size_t room;
} ids;

static int fail(const char *text)
{
    fprintf(stderr, "engram: %s\n", text);
    return EXIT_FAILURE;
}

static int parse(const char *text, long least, long *value)
{
    char *end;
    errno = 0;
    *value = strtol(text, &end, 10);
    return errno == 0 && end != text && *end == '\0' && *value >= least && *value <= INT32_MAX;
}

static int add(ids *self, const char *text)
{
    long value;
    if (!parse(text, 0, &value)) {
        fprintf(stderr, "engram: '%.40s' is not a token id, expected a number from 0\n", text);
        return 0;
    }
    if (self->count == self->room) {
        size_t room = self->room ? 2 * self->room : 64;
        int32_t *values = realloc(self->values, room * sizeof *values);
        if (values == NULL)
            return 0;
        self->values = values;
        self->room = room;
    }
    self->values[self->count++] = (int32_t)value;
    return 1;
}

static int read_ids(ids *self)
{
    char word[41];
    int found;
    while ((found = scanf("%40s", word)) == 1)
        if (!add(self, word))
            return 0;
    return found == EOF && !ferror(stdin);
}

/* Returns whether the command line makes sense. */
static int parse_all(int count, char **texts, settings *options, ids *prompt)
{
    for (int i = 1; i < count; i++) {
        int has_value = i + 1 < count;
        if (!strcmp(texts[i], "--time"))
            options->time = 1;
        else if (!strcmp(texts[i], "--verify"))
            options->verify = 1;
        else if (!strcmp(texts[i], "-d") && has_value)
            options->folder = texts[++i];
        else if (!strcmp(texts[i], "-n") && has_value && parse(texts[i + 1], 1, &options->most))
            i++;
        else if (texts[i][0] == '-' || !add(prompt, texts[i]))
            return 0;
    }
    return 1;
}

static double seconds(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + (double)now.tv_nsec / 1e9;
}

/* Memory by /proc/self/status where there is one: the peak, and what it is made of now. */
static void print_memory(void)
{
    static const char *const names[] = {"VmHWM:", "RssFile:", "RssAnon:"};
    char line[128];
    FILE *status = fopen("/proc/self/status", "r");
    struct rusage usage_now;
    if (status == NULL) {
        getrusage(RUSAGE_SELF, &usage_now);
        fprintf(stderr, "peak memory %ld by getrusage\n", usage_now.ru_maxrss);
        return;
    }
    while (fgets(line, sizeof line, status) != NULL)
        for (size_t i = 0; i < sizeof names / sizeof *names; i++)
            if (!strncmp(line, names[i], strlen(names[i])))
                fprintf(stderr, "%s", line);
    fclose(status);
}

static void print_times(size_t prompt, size_t decoded, double prefill_s, double decode_s)
{
    fprintf(stderr, "prefill %zu tokens in %.3f s, %.1f tok/s\n", prompt, prefill_s, (double)prompt / prefill_s);
    if (decoded > 0)
        fprintf(stderr, "decode %zu tokens in %.3f s, %.1f tok/s\n", decoded, decode_s, (double)decoded / decode_s);
    print_memory();
}

/* Print up to `most` ids after a prompt, as they come. */
static int generate(engram *model, const ids *prompt, const settings *options, engram_error *error)
{
    double begun = seconds(), first = 0;
    long printed = 0;
    const float *logits = engram_step(model, prompt->values, prompt->count, error);
    while (logits != NULL) {
        int32_t id = engram_greedy(logits, error);
        if (id < 0)
            return fail(error->text);
        if (printed == 0)
            first = seconds();
        printf(printed++ ? " %ld" : "%ld", (long)id);
        fflush(stdout);
        int full = engram_length(model) == engram_about()->context_length;
        if (full || printed == options->most || engram_ends(id)) {
            printf("\n");
            if (options->time)
                print_times(prompt->count, (size_t)printed - 1, first - begun, seconds() - first);
            return ferror(stdout) ? fail("the ids can't be written") : EXIT_SUCCESS;
        }
        logits = engram_step(model, &id, 1, error);
    }
    return fail(error->text);
}

static int run(const settings *options, const ids *prompt)
{
    engram_error error;
    if (options->verify)
        return engram_verify(options->folder, &error) ? fail(error.text) : EXIT_SUCCESS;
    engram *model = engram_open(options->folder, &error);
    if (model == NULL)
        return fail(error.text);
    int status = generate(model, prompt, options, &error);
    engram_close(model);
    return status;
}

int main(int count, char **texts)
{
    settings options = {.folder = ".", .most = DEFAULT_TOKENS};
    ids prompt = {0};
    int status = WRONG_USE;
    if (!parse_all(count, texts, &options, &prompt) || (!options.verify && prompt.count == 0 && !read_ids(&prompt)))
        fputs(usage, stderr);
    else
        status = run(&options, &prompt);
    free(prompt.values);
    return status;
}
