// SPDX-License-Identifier: Apache-2.0
// A kernel for tests that attacks the VMM: it drives the registers and rings of all eight virtio devices with garbage, for
// ever (virtio 1.2, 2.7 and 4.2). Set-ups are mostly valid, so that devices get as far as the descriptors, which lie. The
// devices never get the address of the kernel itself. Starts in 64-bit mode with all memory mapped as it is.
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long u64;

enum { DEVICES = 8, VSOCK = 0, BALLOON = 5, QUEUES = 3, MOST = 256, TABLE = 64 << 10 };
enum { READY = 0x44, NUM_MAX = 0x34, NUM = 0x38, SELECT = 0x30, NOTIFY = 0x50, STATUS = 0x70, FEATURES = 0x10 };
enum { DRIVER_FEATURES = 0x20, DRIVER_SELECT = 0x24, ADDRESSES = 0x80, REGISTERS_END = 0x120 };
#define MMIO 0xd0000000ul
#define MEMORY_END (512ul << 20)

struct descriptor {
    u64 address;
    u32 length;
    u16 flags, next;
};
struct table {
    struct descriptor descriptors[MOST];
    u16 available_flags, available_index, available[MOST];
};

static u64 state = 0x9e3779b97f4a7c15;

static u64 roll(void) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return state;
}

static volatile u32 *reg(u64 device, u64 offset) { return (volatile u32 *)(MMIO + device * 0x1000 + offset); }

// The memory of one device: a table for each queue, then what descriptors point to.
static u64 area(u64 device) { return (64ul << 20) + device * (16ul << 20); }
static struct table *table(u64 device, u64 queue) { return (struct table *)(area(device) + queue * TABLE); }

static void set_up(u64 device) {
    *reg(device, STATUS) = 0;
    *reg(device, STATUS) = 3;
    *reg(device, DRIVER_SELECT) = 1;
    *reg(device, DRIVER_FEATURES) = 1;
    *reg(device, DRIVER_SELECT) = 0;
    *reg(device, DRIVER_FEATURES) = *reg(device, FEATURES) & (roll() | roll());
    *reg(device, STATUS) = 11;
    for (u64 queue = 0; queue < QUEUES; queue++) {
        *reg(device, SELECT) = queue;
        u32 most = *reg(device, NUM_MAX);
        if (most == 0)
            continue;
        u64 size = 1ul << roll() % 9;
        *reg(device, NUM) = roll() % 16 ? (size < most ? size : most) : roll();
        u64 base = area(device) + queue * TABLE;
        u64 parts[3] = {base, base + sizeof(struct descriptor) * MOST, base + TABLE / 2};
        for (u64 part = 0; part < 3; part++) {
            u64 at = roll() % 64 ? parts[part] : roll();
            *reg(device, ADDRESSES + part * 0x10) = at;
            *reg(device, ADDRESSES + part * 0x10 + 4) = at >> 32;
        }
        *reg(device, READY) = 1;
    }
    *reg(device, STATUS) = 15;
}

static u64 address(u64 device) {
    u64 base = area(device);
    switch (roll() % 8) {
    case 0: return roll();                       // nowhere
    case 1: return MEMORY_END - roll() % 64;     // over the end
    case 2: return MMIO + roll() % 0x8000;       // registers
    case 3: return base + roll() % (3 * TABLE);  // the tables themselves
    default: return base + (1 << 20) + roll() % (8 << 20) / 8 * 8;
    }
}

static u32 length(void) {
    static const u32 some[] = {0, 1, 8, 10, 12, 16, 44, 80, 511, 512, 4096, 65536, 1u << 30, 0xffffffff};
    return roll() % 4 ? some[roll() % (sizeof some / sizeof *some)] : roll();
}

// Writes what a device may take for a header: small numbers for most of them, pages far from this kernel for the balloon.
static void fill(u64 device, u64 at) {
    if (at < area(device) || at + 64 > area(device) + (16 << 20))
        return;
    u32 *words = (u32 *)at;
    for (int word = 0; word < 16; word++)
        words[word] = device == BALLOON ? 0x4000 + roll() % 0x1c000 : roll() % 4 ? roll() % 16 : roll();
    if (device == VSOCK && roll() % 4) {
        u64 *cids = (u64 *)at;
        cids[0] = 3;                         // from this guest
        cids[1] = 2;                         // to the host
        words[4] = 1024 + roll() % 4;        // ports
        words[5] = 1024 + roll() % 2;
        words[7] = 1 | (u32)(roll() % 9) << 16;
    }
}

static void lie(u64 device, u64 queue) {
    struct table *lies = table(device, queue);
    for (int chain = 0; chain < 8; chain++) {
        u64 head = roll() % MOST;
        for (u64 at = head, left = 1 + roll() % 6; left; left--) {
            struct descriptor *one = &lies->descriptors[at];
            one->address = address(device);
            one->length = length();
            one->flags = (left > 1) | (roll() % 3 == 0) << 1 | (roll() % 16 == 0) << 2;
            one->next = roll() % 32 ? (at + 1) % MOST : roll();
            fill(device, one->address);
            at = (at + 1) % MOST;
        }
        u16 index = lies->available_index;
        lies->available[(index + chain) % MOST] = roll() % 32 ? head : roll();
    }
    asm volatile("" ::: "memory");
    lies->available_index += roll() % 64 ? 1 + roll() % 8 : roll();
    *reg(device, NOTIFY) = roll() % 64 ? queue : roll();
}

void start(void) {
    for (u64 device = 0; device < DEVICES; device++)
        set_up(device);
    for (;;) {
        u64 device = roll() % DEVICES;
        lie(device, roll() % QUEUES);
        switch (roll() % 64) {
        case 0: set_up(device); break;
        case 1: *reg(device, roll() % REGISTERS_END / 4 * 4) = roll(); break;
        case 2: asm volatile("outb %0, %1" ::"a"((u8)roll()), "Nd"((u16)0x3f8)); break;
        }
    }
}
