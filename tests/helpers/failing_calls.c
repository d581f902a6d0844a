/* Loaded before the C library: the N-th call that changes a folder ends the process, or fails.

   Counted are writes to files below a folder, and every rename, link, unlink, mkdir and fsync. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static const char *below = 0; /* the folder; nothing is counted before it is given */
static int calls = 0, chosen = 0, action = 0, lasting = 0;

/* action: 0 for a kill, or an errno. lasting: every later call but an unlink fails as well. */
void fail_call(const char *folder, int number, int how, int for_good) {
    below = folder, calls = 0, chosen = number, action = how, lasting = for_good;
}

int counted_calls(void) { return calls; }

static int fails(int removes) {
    if (!below) return 0;
    calls++;
    if (calls != chosen && !(lasting && calls > chosen && !removes)) return 0;
    if (lasting && removes) return 0;
    if (!action) kill(getpid(), SIGKILL), pause();
    errno = action;
    return 1;
}

static int is_below(int fd) {
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return !strncmp(path, below, strlen(below));
}

#define REAL(name) ((__typeof__(name) *)dlsym(RTLD_NEXT, #name))

ssize_t write(int fd, const void *data, size_t size) {
    if (below && fd > 2 && is_below(fd) && fails(0)) return -1;
    return REAL(write)(fd, data, size);
}
int fsync(int fd) { return fails(0) ? -1 : REAL(fsync)(fd); }
int rename(const char *a, const char *b) { return fails(0) ? -1 : REAL(rename)(a, b); }
int renameat(int d, const char *a, int e, const char *b) {
    return fails(0) ? -1 : REAL(renameat)(d, a, e, b);
}
int renameat2(int d, const char *a, int e, const char *b, unsigned how) {
    return fails(0) ? -1 : REAL(renameat2)(d, a, e, b, how);
}
int link(const char *a, const char *b) { return fails(0) ? -1 : REAL(link)(a, b); }
int linkat(int d, const char *a, int e, const char *b, int how) {
    return fails(0) ? -1 : REAL(linkat)(d, a, e, b, how);
}
int mkdir(const char *path, mode_t mode) { return fails(0) ? -1 : REAL(mkdir)(path, mode); }
int unlink(const char *path) { return fails(1) ? -1 : REAL(unlink)(path); }
int unlinkat(int d, const char *path, int how) {
    return fails(1) ? -1 : REAL(unlinkat)(d, path, how);
}
