// SPDX-License-Identifier: Apache-2.0
// udp-echo PORT                   sends back every datagram that arrives, over IPv4 and IPv6
// udp-echo ADDRESS PORT TEXT      sends TEXT until an answer comes, at most ten times, and prints the answer
#include <arpa/inet.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

static int serve(const char *port) {
    struct sockaddr_in6 here = {.sin6_family = AF_INET6, .sin6_port = htons(atoi(port))};
    int off = 0, fd = socket(AF_INET6, SOCK_DGRAM, 0);
    setsockopt(fd, IPPROTO_IPV6, IPV6_V6ONLY, &off, sizeof off);
    if (bind(fd, (struct sockaddr *)&here, sizeof here) != 0) {
        perror("bind");
        return 1;
    }
    for (;;) {
        static char data[65536];
        struct sockaddr_storage peer;
        socklen_t len = sizeof peer;
        ssize_t got = recvfrom(fd, data, sizeof data, 0, (struct sockaddr *)&peer, &len);
        if (got >= 0)
            sendto(fd, data, got, 0, (struct sockaddr *)&peer, len);
    }
}

static int ask(const char *address, const char *port, const char *text) {
    struct sockaddr_in6 there = {.sin6_family = AF_INET6, .sin6_port = htons(atoi(port))};
    char mapped[64];
    snprintf(mapped, sizeof mapped, strchr(address, ':') ? "%s" : "::ffff:%s", address);
    if (inet_pton(AF_INET6, mapped, &there.sin6_addr) != 1)
        return 2;
    int fd = socket(AF_INET6, SOCK_DGRAM, 0);
    struct timeval second = {.tv_sec = 1};
    setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &second, sizeof second);
    if (connect(fd, (struct sockaddr *)&there, sizeof there) != 0)
        return 3;
    for (int try = 0; try < 10; try++) {
        static char data[65536];
        send(fd, text, strlen(text), 0);
        ssize_t got = recv(fd, data, sizeof data - 1, 0);
        if (got >= 0) {
            puts(data);
            return 0;
        }
    }
    return 4;
}

int main(int argc, char **argv) {
    if (argc == 2)
        return serve(argv[1]);
    return argc == 4 ? ask(argv[1], argv[2], argv[3]) : 64;
}
