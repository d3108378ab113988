// SPDX-License-Identifier: Apache-2.0
// Prints the name of each file that is moved into a directory, as a program that watches its configuration sees it.
// The tests compile it to a static binary, because busybox has no such program.
#include <stdio.h>
#include <sys/inotify.h>
#include <unistd.h>

int main(int argc, char **argv) {
    char buffer[4096] __attribute__((aligned(__alignof__(struct inotify_event))));
    int fd = inotify_init();
    if (argc != 2 || fd < 0 || inotify_add_watch(fd, argv[1], IN_MOVED_TO) < 0) {
        perror("watch");
        return 1;
    }
    for (;;) {
        ssize_t length = read(fd, buffer, sizeof buffer);
        if (length <= 0)
            return 1;
        for (char *at = buffer; at < buffer + length;) {
            struct inotify_event *event = (struct inotify_event *)at;
            puts(event->len ? event->name : "");
            at += sizeof *event + event->len;
        }
        fflush(stdout);
    }
}
