/* Prints its effective user. Installed with the set-user-ID bit, it shows whether the bit had an effect. */
#include <stdio.h>
#include <unistd.h>

int main(void)
{
    printf("Effective uid: %d\n", (int)geteuid());
    return 0;
}
