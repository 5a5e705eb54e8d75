/* The load generator of `migproxy bench`: it writes stamped bytes at one end of a chain of relays and checks
 * them at the other, with a thread for each connection, as QEMU has for each multifd channel. Each block of
 * 512 bytes begins with a stamp of its connection and its place in the stream, so that lost, repeated, mixed
 * up and reordered pages are found for the price of touching one cache line in eight.
 *
 *   traffic read  CONNECTIONS SLOW SECONDS PATH...   listen on each PATH, check what arrives; a PATH given twice
 *                                                    in a row has twice the connections
 *   traffic write CONNECTIONS SECONDS CHUNK PATH...  connect to each PATH, write CHUNK bytes at a time
 *   traffic echo  PATH                               listen, send everything back
 *   traffic ping  COUNT SIZE PATH                    round trips, one after the other
 *   traffic setup SECONDS PARALLEL PATH              connect, one message there and back, close; again and again
 *
 * Results are lines of JSON on standard output; times are CLOCK_MONOTONIC, which the processes share. `write`
 * says "ready" when each connection has been answered from the far end, begins at a line on standard input,
 * and keeps its connections open until standard input ends: what relays used can be read off in between.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 512, MOST_WRITTEN = 4 << 20, READ_SIZE = 256 << 10, ECHO_THREADS = 64, STACK = 64 << 10 };
#define PLACE 0xffffffffffffull /* a stamp: connection << 48 | number of the block; all ones: the last block */

static _Noreturn void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    exit(1);
}

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec / 1e9;
}

static void pause_for(double seconds) {
    struct timespec time = {seconds, (seconds - (long)seconds) * 1e9};
    while (nanosleep(&time, &time) && errno == EINTR) {}
}

static int open_socket(const char *path, int (*use)(int, const struct sockaddr *, socklen_t), const char *what) {
    struct sockaddr_un address = {.sun_family = AF_UNIX};
    if (strlen(path) >= sizeof address.sun_path) die("%s: too long for a unix socket", path);
    strcpy(address.sun_path, path);
    int sock = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (sock < 0 || use(sock, (struct sockaddr *)&address, sizeof address)) {
        die("%s: cannot %s: %s", path, what, strerror(errno));
    }
    return sock;
}

static int dial(const char *path) { return open_socket(path, connect, "connect"); }

static int listen_at(const char *path) {
    unlink(path);
    int sock = open_socket(path, bind, "listen");
    if (listen(sock, 4096)) die("%s: %s", path, strerror(errno));
    return sock;
}

static int write_all(int fd, const void *data, size_t size) {
    for (const char *at = data; size;) {
        ssize_t count = write(fd, at, size);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return -1;
        at += count, size -= count;
    }
    return 0;
}

static int read_all(int fd, void *data, size_t size) {
    for (char *at = data; size;) {
        ssize_t count = read(fd, at, size);
        if (count < 0 && errno == EINTR) continue;
        if (count <= 0) return -1;
        at += count, size -= count;
    }
    return 0;
}

static pthread_t start(void *(*work)(void *), void *argument) {
    pthread_attr_t attributes;
    pthread_t thread;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK);
    int error = pthread_create(&thread, &attributes, work, argument);
    if (error) die("thread: %s", strerror(error));
    pthread_attr_destroy(&attributes);
    return thread;
}

struct stream {
    int fd;
    uint64_t id;
    _Atomic uint64_t bytes;
    double ended;
    pthread_t thread;
};

static double deadline; /* when the writers stop */
static size_t chunk;
static int slow;
static _Atomic int live;
static pthread_barrier_t all_ended;

/* Writes until the deadline; then the last block, which says so. */
static void *write_stream(void *argument) {
    struct stream *stream = argument;
    uint64_t block = stream->bytes / BLOCK;
    char *data = aligned_alloc(4096, chunk < BLOCK ? BLOCK : chunk);
    memset(data, 0x5a, chunk);
    while (now() < deadline) {
        for (size_t at = 0; at < chunk; at += BLOCK) *(uint64_t *)(data + at) = stream->id << 48 | block++;
        if (write_all(stream->fd, data, chunk)) die("connection %" PRIu64 ": write: %s", stream->id, strerror(errno));
        stream->bytes += chunk;
    }
    *(uint64_t *)data = stream->id << 48 | PLACE;
    if (write_all(stream->fd, data, BLOCK)) die("connection %" PRIu64 ": write: %s", stream->id, strerror(errno));
    stream->bytes += BLOCK;
    free(data);
    return NULL;
}

/* Checks every stamp; the first block, which is answered, tells which connection it is. */
static void *read_stream(void *argument) {
    struct stream *stream = argument;
    char *data = aligned_alloc(4096, READ_SIZE);
    size_t held = 0;
    uint64_t block = 0;
    for (int last = 0; !last;) {
        int is_slow = block && stream->id < (uint64_t)slow && live;
        if (is_slow) pause_for(0.02);
        ssize_t count = read(stream->fd, data + held, (is_slow ? 64 << 10 : READ_SIZE) - held);
        if (count < 0 && errno == EINTR) continue;
        if (count < 0) die("connection %" PRIu64 ": read: %s", stream->id, strerror(errno));
        if (count == 0) {
            if (block == 1) exit(0); /* it was only held open */
            die("connection %" PRIu64 " ended after %" PRIu64 " blocks, before its last one", stream->id, block);
        }
        stream->bytes += count;
        held += count;
        size_t at = 0;
        for (; held - at >= BLOCK; at += BLOCK, block++) {
            uint64_t stamp = *(uint64_t *)(data + at);
            if (block == 0) {
                stream->id = stamp >> 48;
                if (write_all(stream->fd, "!", 1)) die("connection %" PRIu64 ": %s", stream->id, strerror(errno));
            }
            last = (stamp & PLACE) == PLACE;
            if (stamp >> 48 != stream->id || (!last && (stamp & PLACE) != block)) {
                die("connection %" PRIu64 ": block %" PRIu64 " has the stamp %016" PRIx64, stream->id, block, stamp);
            }
        }
        held -= at;
        memmove(data, data + at, held);
        if (last && held) die("connection %" PRIu64 ": bytes after the last block", stream->id);
    }
    stream->ended = now();
    pthread_barrier_wait(&all_ended);
    while (read(stream->fd, data, READ_SIZE) > 0) {}
    close(stream->fd);
    free(data);
    return NULL;
}


static void print_bytes(const char *name, const uint64_t *bytes, int count) {
    printf("\"%s\": [", name);
    for (int i = 0; i < count; i++) printf("%s%" PRIu64, i ? ", " : "", bytes[i]);
    printf("]");
}

static int run_read(int connections, double seconds, char **paths, int count) {
    int total = connections * count;
    struct stream *streams = calloc(total, sizeof *streams);
    uint64_t *within = calloc(total, sizeof *within), *bytes = calloc(total, sizeof *bytes);
    int *listeners = calloc(count, sizeof *listeners);
    pthread_barrier_init(&all_ended, NULL, total + 1);
    live = 1;
    for (int i = 0; i < count; i++) {
        listeners[i] = i && !strcmp(paths[i], paths[i - 1]) ? listeners[i - 1] : listen_at(paths[i]);
    }
    puts("listening");
    for (int i = 0; i < total; i++) {
        streams[i].fd = accept4(listeners[i / connections], NULL, NULL, SOCK_CLOEXEC);
        if (streams[i].fd < 0) die("%s: accept: %s", paths[i / connections], strerror(errno));
        streams[i].thread = start(read_stream, &streams[i]);
    }
    for (int begun = 0; !begun; pause_for(0.0005)) {
        for (int i = 0; i < total && !begun; i++) begun = streams[i].bytes > BLOCK;
    }
    pause_for(seconds / 2);
    for (int i = 0; i < total; i++) within[i] = streams[i].bytes;
    pause_for(seconds / 2);
    for (int i = 0; i < total; i++) within[i] = streams[i].bytes - within[i];
    live = 0;
    pthread_barrier_wait(&all_ended);
    double ended = 0;
    uint64_t *by_connection = calloc(total, sizeof *by_connection);
    for (int i = 0; i < total; i++) {
        if (streams[i].ended > ended) ended = streams[i].ended;
        by_connection[streams[i].id] = within[i];
        bytes[streams[i].id] = streams[i].bytes;
    }
    printf("{\"ended\": %.9f, ", ended);
    print_bytes("within", by_connection, total);
    printf(", ");
    print_bytes("bytes", bytes, total);
    puts("}");
    for (int i = 0; i < total; i++) pthread_join(streams[i].thread, NULL);
    return 0;
}

static int run_write(int connections, double seconds, char **paths, int count) {
    int total = connections * count;
    struct stream *streams = calloc(total, sizeof *streams);
    uint64_t *bytes = calloc(total, sizeof *bytes);
    for (int i = 0; i < total; i++) {
        char first[BLOCK] = {0};
        streams[i].fd = dial(paths[i / connections]);
        streams[i].id = i;
        *(uint64_t *)first = (uint64_t)i << 48;
        if (write_all(streams[i].fd, first, BLOCK)) die("connection %d: write: %s", i, strerror(errno));
        streams[i].bytes = BLOCK;
    }
    for (int i = 0; i < total; i++) {
        char answer;
        if (read_all(streams[i].fd, &answer, 1)) die("connection %d: no answer from the far end", i);
    }
    puts("ready");
    if (getchar() == EOF) return 0;
    double began = now();
    deadline = began + seconds;
    for (int i = 0; i < total; i++) streams[i].thread = start(write_stream, &streams[i]);
    for (int i = 0; i < total; i++) {
        pthread_join(streams[i].thread, NULL);
        bytes[i] = streams[i].bytes;
    }
    printf("{\"began\": %.9f, ", began);
    print_bytes("bytes", bytes, total);
    puts("}");
    while (getchar() != EOF) {}
    return 0;
}

static void *echo(void *argument) {
    int listener = *(int *)argument;
    char data[4096];
    for (;;) {
        int fd = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (fd < 0) {
            if (errno == ECONNABORTED || errno == EINTR) continue;
            die("accept: %s", strerror(errno));
        }
        for (ssize_t count; (count = read(fd, data, sizeof data)) > 0 && !write_all(fd, data, count);) {}
        close(fd);
    }
}

static int run_echo(const char *path) {
    int listener = listen_at(path);
    for (int i = 0; i < ECHO_THREADS; i++) start(echo, &listener);
    puts("listening");
    while (getchar() != EOF) {}
    return 0;
}

static int ascending(const void *a, const void *b) {
    double left = *(const double *)a, right = *(const double *)b;
    return (left > right) - (left < right);
}

static int run_ping(int count, size_t size, const char *path) {
    int fd = dial(path), warming = count / 10 + 1;
    double *seconds = calloc(count, sizeof *seconds);
    char *message = calloc(1, size), *answer = malloc(size);
    for (int i = -warming; i < count; i++) {
        *(int *)message = i;
        double began = now();
        if (write_all(fd, message, size) || read_all(fd, answer, size)) die("%s: the connection ended", path);
        if (memcmp(message, answer, size)) die("%s: message %d came back altered", path, i);
        if (i >= 0) seconds[i] = now() - began;
    }
    qsort(seconds, count, sizeof *seconds, ascending);
    printf("{\"p50\": %.9f, \"p99\": %.9f}\n", seconds[count / 2], seconds[count * 99 / 100]);
    return 0;
}

struct setup {
    const char *path;
    uint64_t done;
    pthread_t thread;
};

static void *set_up(void *argument) {
    struct setup *setup = argument;
    char message[64] = {1}, answer[64];
    while (now() < deadline) {
        int fd = dial(setup->path);
        if (write_all(fd, message, sizeof message) || read_all(fd, answer, sizeof answer)) {
            die("%s: a connection ended unanswered", setup->path);
        }
        close(fd);
        setup->done++;
    }
    return NULL;
}

static int run_setup(double seconds, int parallel, const char *path) {
    struct setup *setups = calloc(parallel, sizeof *setups);
    uint64_t done = 0;
    double began = now();
    deadline = began + seconds;
    for (int i = 0; i < parallel; i++) {
        setups[i].path = path;
        setups[i].thread = start(set_up, &setups[i]);
    }
    for (int i = 0; i < parallel; i++) {
        pthread_join(setups[i].thread, NULL);
        done += setups[i].done;
    }
    printf("{\"connections\": %" PRIu64 ", \"seconds\": %.9f}\n", done, now() - began);
    return 0;
}

int main(int count, char **words) {
    const char *mode = count > 1 ? words[1] : "";
    setvbuf(stdout, NULL, _IOLBF, 0);
    signal(SIGPIPE, SIG_IGN);
    if (!strcmp(mode, "read") && count > 5) {
        slow = atoi(words[3]);
        return run_read(atoi(words[2]), atof(words[4]), words + 5, count - 5);
    }
    if (!strcmp(mode, "write") && count > 5) {
        chunk = strtoull(words[4], NULL, 10);
        if (!chunk || chunk % BLOCK || chunk > MOST_WRITTEN) die("%s: not a multiple of %d", words[4], BLOCK);
        return run_write(atoi(words[2]), atof(words[3]), words + 5, count - 5);
    }
    if (!strcmp(mode, "echo") && count == 3) return run_echo(words[2]);
    if (!strcmp(mode, "ping") && count == 5) return run_ping(atoi(words[2]), strtoull(words[3], NULL, 10), words[4]);
    if (!strcmp(mode, "setup") && count == 5) return run_setup(atof(words[2]), atoi(words[3]), words[4]);
    die("traffic: see the head of its source");
}
