/* Preloaded into a run under test: counts what it does to the files below one folder. At the n-th of these events it
 * kills its process group: a write is torn in the middle, everything else is not done any more. Or, from there on, all
 * that needs room (or, where the folder cannot be written, everything) fails with an error. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char below[4096];
static long last, events;
static int fault;

void arm(const char *folder, long at, int error) {
    strncpy(below, folder, sizeof below - 1);
    last = at;
    fault = error;
}

long counted(void) { return events; }

static int is_below(const char *path) { return below[0] && strncmp(path, below, strlen(below)) == 0; }

static int names(int at, const char *path) {
    char place[64], folder[4096] = "";
    if (!below[0] || !path) return 0;
    if (path[0] == '/') return is_below(path);
    if (at == AT_FDCWD) strcpy(place, "/proc/self/cwd");
    else snprintf(place, sizeof place, "/proc/self/fd/%d", at);
    return readlink(place, folder, sizeof folder - 1) > 0 && is_below(folder);
}

static int owns(int file) {
    char place[64], path[4096] = "";
    if (!below[0]) return 0;
    snprintf(place, sizeof place, "/proc/self/fd/%d", file);
    return readlink(place, path, sizeof path - 1) > 0 && is_below(path);
}

static int is_due(void) {
    long event = __atomic_add_fetch(&events, 1, __ATOMIC_SEQ_CST);
    return last && (event == last || (fault && event > last));
}

static int end(void) {
    if (!fault) {
        kill(-getpgrp(), SIGKILL);
        for (;;) pause();
    }
    errno = fault;
    return -1;
}

static int needs_room(void) { return fault == ENOSPC || fault == EDQUOT; }

#define REAL(name) __typeof__(&name) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define NAMED(at, path) if (names(at, path) && is_due()) return end()
#define REMOVED(at, path) if (names(at, path) && is_due() && !needs_room()) return end()

ssize_t write(int file, const void *data, size_t size) {
    REAL(write);
    if (owns(file) && is_due()) { if (!fault) real(file, data, size / 2); return end(); }
    return real(file, data, size);
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t at) {
    REAL(pwrite64);
    if (owns(file) && is_due()) { if (!fault) real(file, data, size / 2, at); return end(); }
    return real(file, data, size, at);
}

ssize_t writev(int file, const struct iovec *parts, int count) {
    REAL(writev);
    if (owns(file) && is_due()) { if (!fault) real(file, parts, count / 2); return end(); }
    return real(file, parts, count);
}

ssize_t copy_file_range(int from, off64_t *a, int to, off64_t *b, size_t size, unsigned flags) {
    REAL(copy_file_range);
    if (owns(to) && is_due()) { if (!fault) real(from, a, to, b, size / 2, flags); return end(); }
    return real(from, a, to, b, size, flags);
}

int ftruncate64(int file, off64_t size) {
    REAL(ftruncate64);
    if (owns(file) && is_due()) return end();
    return real(file, size);
}

int rename(const char *from, const char *to) { REAL(rename); NAMED(AT_FDCWD, to); return real(from, to); }

int renameat2(int a, const char *from, int b, const char *to, unsigned flags) {
    REAL(renameat2); NAMED(b, to); return real(a, from, b, to, flags);
}

int link(const char *from, const char *to) { REAL(link); NAMED(AT_FDCWD, to); return real(from, to); }

int linkat(int a, const char *from, int b, const char *to, int flags) {
    REAL(linkat); NAMED(b, to); return real(a, from, b, to, flags);
}

int unlink(const char *path) { REAL(unlink); REMOVED(AT_FDCWD, path); return real(path); }

int unlinkat(int at, const char *path, int flags) { REAL(unlinkat); REMOVED(at, path); return real(at, path, flags); }

int rmdir(const char *path) { REAL(rmdir); REMOVED(AT_FDCWD, path); return real(path); }

int mkdir(const char *path, mode_t mode) { REAL(mkdir); NAMED(AT_FDCWD, path); return real(path, mode); }

int mkdirat(int at, const char *path, mode_t mode) { REAL(mkdirat); NAMED(at, path); return real(at, path, mode); }

#define OPENS(flags) \
    mode_t mode = 0; \
    if ((flags) & O_CREAT) { va_list more; va_start(more, flags); mode = va_arg(more, mode_t); va_end(more); }

int open64(const char *path, int flags, ...) {
    REAL(open64); OPENS(flags);
    if (flags & (O_CREAT | O_TRUNC)) { NAMED(AT_FDCWD, path); }
    return real(path, flags, mode);
}

int open(const char *path, int flags, ...) {
    REAL(open); OPENS(flags);
    if (flags & (O_CREAT | O_TRUNC)) { NAMED(AT_FDCWD, path); }
    return real(path, flags, mode);
}
