/* Prints who it runs as: installed with the set-user-ID bit, it tells whether that bit had an effect. */
#include <stdio.h>
#include <unistd.h>

int main(void)
{
    printf("Effective uid: %d\n", (int)geteuid());
    return 0;
}
