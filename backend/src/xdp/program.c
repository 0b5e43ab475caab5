// The XDP program of an AF_XDP port: takes the classes of packets that are in its maps, and leaves all others to the
// kernel, so that the device stays the host's.
//
// scripts/build-xdp compiles it to program.o, which is committed beside it; the daemon loads that. The maps are
// written by program.rs, which knows the layout of the keys. Constants: linux/bpf.h, linux/if_ether.h.

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define SECTION(name) __attribute__((section(name), used))
#define INLINE static inline __attribute__((always_inline))
#define HTONS(x) ((u16)((((x) & 0xff) << 8) | (((x) >> 8) & 0xff)))

struct xdp_md {
	u32 data, data_end, data_meta, ingress_ifindex, rx_queue_index, egress_ifindex;
};

struct bpf_map_def {
	u32 type, key_size, value_size, max_entries, map_flags;
};

enum { MAP_TYPE_HASH = 1, MAP_TYPE_ARRAY = 2, MAP_TYPE_XSKMAP = 17, NO_PREALLOC = 1 };
enum { XDP_PASS = 2 };

static void *(*map_lookup)(void *map, const void *key) = (void *)1;
static long (*redirect_map)(void *map, u64 key, u64 flags) = (void *)51;

enum { MAX_QUEUES = 64, MAX_CLASSES = 65536 };
// The VLAN id of packets without a tag. A priority tag is a tag with id 0.
enum { NO_VLAN = 0xffff };

// Keys are in network byte order, the VLAN id in host order. No padding.
struct mac_key {
	u8 mac[6];
	u16 vlan;
};
struct ethertype_key {
	u16 ethertype, vlan;
};
struct tunnel_key {
	u32 address[4]; // IPv4: in the first word, the others 0
	u16 port, vlan, ethertype, zero;
};

// The sockets, by receive queue.
struct bpf_map_def SECTION("maps") sockets = { MAP_TYPE_XSKMAP, 4, 4, MAX_QUEUES, 0 };
// One word: not 0 takes every packet.
struct bpf_map_def SECTION("maps") everything = { MAP_TYPE_ARRAY, 4, 4, 1, 0 };
struct bpf_map_def SECTION("maps") macs = { MAP_TYPE_HASH, sizeof(struct mac_key), 1, MAX_CLASSES, NO_PREALLOC };
struct bpf_map_def SECTION("maps") ethertypes = { MAP_TYPE_HASH, sizeof(struct ethertype_key), 1, MAX_CLASSES,
						  NO_PREALLOC };
struct bpf_map_def SECTION("maps") tunnels = { MAP_TYPE_HASH, sizeof(struct tunnel_key), 1, MAX_CLASSES, NO_PREALLOC };

struct ethernet {
	u8 dst[6], src[6];
	u16 ethertype;
};
struct vlan_tag {
	u16 tci, ethertype;
};
struct ipv4 {
	u8 version_ihl, tos;
	u16 len, id, fragment;
	u8 ttl, protocol;
	u16 checksum;
	u32 src, dst;
};
struct ipv6 {
	u32 version_class_label;
	u16 len;
	u8 protocol, hop_limit;
	u32 src[4], dst[4];
};
struct udp {
	u16 src, dst, len, checksum;
};

enum { IPV4 = HTONS(0x0800), IPV6 = HTONS(0x86dd), VLAN = HTONS(0x8100), SERVICE_VLAN = HTONS(0x88a8), UDP = 17 };
// More fragments, or not the first one.
enum { FRAGMENT = HTONS(0x3fff) };

// Whether the packet is UDP to a tunnel endpoint of ours. Fragments and options are the kernel's.
INLINE int is_tunnel(u16 ethertype, u16 vlan, void *at, void *end)
{
	struct tunnel_key key = { .vlan = vlan, .ethertype = ethertype };
	struct udp *udp;
	if (ethertype == IPV4) {
		struct ipv4 *ip = at;
		udp = (void *)(ip + 1);
		if ((void *)(udp + 1) > end || ip->version_ihl != 0x45 || ip->protocol != UDP || (ip->fragment & FRAGMENT))
			return 0;
		key.address[0] = ip->dst;
	} else if (ethertype == IPV6) {
		struct ipv6 *ip = at;
		udp = (void *)(ip + 1);
		if ((void *)(udp + 1) > end || ip->protocol != UDP)
			return 0;
		key.address[0] = ip->dst[0];
		key.address[1] = ip->dst[1];
		key.address[2] = ip->dst[2];
		key.address[3] = ip->dst[3];
	} else {
		return 0;
	}
	key.port = udp->dst;
	return map_lookup(&tunnels, &key) != 0;
}

INLINE int is_ours(void *data, void *end)
{
	u32 zero = 0;
	u32 *all = map_lookup(&everything, &zero);
	if (all && *all)
		return 1;

	struct ethernet *eth = data;
	void *at = eth + 1;
	if (at > end)
		return 0;
	u16 ethertype = eth->ethertype, vlan = NO_VLAN;
	if (ethertype == VLAN || ethertype == SERVICE_VLAN) {
		struct vlan_tag *tag = at;
		at = tag + 1;
		if (at > end)
			return 0;
		vlan = HTONS(tag->tci) & 0xfff;
		ethertype = tag->ethertype;
	}

	struct mac_key mac = { .vlan = vlan };
	__builtin_memcpy(mac.mac, eth->dst, 6);
	if (map_lookup(&macs, &mac))
		return 1;
	struct ethertype_key type = { ethertype, vlan };
	if (map_lookup(&ethertypes, &type))
		return 1;
	return is_tunnel(ethertype, vlan, at, end);
}

// "frags": the program does not mind packets in several buffers; it looks at the first one only.
int SECTION("xdp.frags") pointwork(struct xdp_md *ctx)
{
	void *data = (void *)(u64)ctx->data, *end = (void *)(u64)ctx->data_end;
	if (!is_ours(data, end))
		return XDP_PASS;
	// A queue without a socket: the packet is the kernel's after all.
	return redirect_map(&sockets, ctx->rx_queue_index, XDP_PASS);
}

char SECTION("license") license_name[] = "Apache-2.0";
