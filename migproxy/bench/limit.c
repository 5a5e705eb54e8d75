/* The limit that relays are compared with: nothing but splice(2), a thread for each direction, no checks, no counts.
 *
 *   limit source PATH HOST PORT   listens on the unix socket PATH, connects to HOST:PORT
 *   limit target PATH HOST PORT   listens on HOST:PORT, connects to the unix socket PATH
 *
 * Pipes, socket options and congestion control (cubic) are migproxy's: what is left between the two is the cost of
 * everything else that a daemon does.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

enum { PIPE = 1 << 20, UNIX_BUFFER = 1 << 20, BACKLOG = 512, STACK = 64 << 10 };

static struct sockaddr_un local = {.sun_family = AF_UNIX};
static struct sockaddr_in remote = {.sin_family = AF_INET};

struct pair { int unix_end, tcp_end; _Atomic int pumps; };
struct pump { struct pair *pair; int from, to; };

static _Noreturn void die(const char *what) {
    perror(what);
    exit(1);
}

static pthread_t start(void *(*work)(void *), void *argument) {
    pthread_attr_t attributes;
    pthread_t thread;
    pthread_attr_init(&attributes);
    pthread_attr_setstacksize(&attributes, STACK);
    pthread_attr_setdetachstate(&attributes, PTHREAD_CREATE_DETACHED);
    if (pthread_create(&thread, &attributes, work, argument)) die("thread");
    pthread_attr_destroy(&attributes);
    return thread;
}

static void *run(void *argument) {
    struct pump pump = *(struct pump *)argument;
    int pipe[2];
    free(argument);
    if (pipe2(pipe, O_CLOEXEC)) die("pipe");
    fcntl(pipe[1], F_SETPIPE_SZ, PIPE);
    for (ssize_t held; (held = splice(pump.from, NULL, pipe[1], NULL, PIPE, 0)) > 0;) {
        while (held > 0) {
            ssize_t sent = splice(pipe[0], NULL, pump.to, NULL, held, 0);
            if (sent <= 0) goto end;
            held -= sent;
        }
    }
end:
    shutdown(pump.to, SHUT_WR);
    close(pipe[0]);
    close(pipe[1]);
    if (atomic_fetch_sub(&pump.pair->pumps, 1) == 1) {
        close(pump.pair->unix_end);
        close(pump.pair->tcp_end);
        free(pump.pair);
    }
    return NULL;
}

static void begin(struct pair *pair, int from, int to) {
    struct pump *pump = malloc(sizeof *pump);
    *pump = (struct pump){pair, from, to};
    start(run, pump);
}

static void tune_tcp(int sock) {
    int on = 1;
    setsockopt(sock, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    setsockopt(sock, IPPROTO_TCP, TCP_CONGESTION, "cubic", 5);
}

int main(int count, char **words) {
    int source = count == 5 && !strcmp(words[1], "source"), size = UNIX_BUFFER;
    if (count != 5 || strlen(words[2]) >= sizeof local.sun_path) return 2;
    signal(SIGPIPE, SIG_IGN);
    strcpy(local.sun_path, words[2]);
    inet_pton(AF_INET, words[3], &remote.sin_addr);
    remote.sin_port = htons(atoi(words[4]));
    struct sockaddr *here = source ? (struct sockaddr *)&local : (struct sockaddr *)&remote;
    struct sockaddr *there = source ? (struct sockaddr *)&remote : (struct sockaddr *)&local;
    socklen_t here_size = source ? sizeof local : sizeof remote, there_size = source ? sizeof remote : sizeof local;
    int listener = socket(here->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
    if (source) unlink(words[2]);
    if (bind(listener, here, here_size) || listen(listener, BACKLOG)) die("listen");
    for (;;) {
        int near = accept4(listener, NULL, NULL, SOCK_CLOEXEC);
        if (near < 0) continue;
        int far = socket(there->sa_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
        tune_tcp(source ? far : near);
        if (connect(far, there, there_size)) {
            perror("connect");
            close(near);
            close(far);
            continue;
        }
        struct pair *pair = malloc(sizeof *pair);
        *pair = (struct pair){source ? near : far, source ? far : near, 2};
        setsockopt(pair->unix_end, SOL_SOCKET, SO_SNDBUFFORCE, &size, sizeof size);
        begin(pair, near, far);
        begin(pair, far, near);
    }
}
