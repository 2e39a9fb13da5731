/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * What differs between the ways to load the probe, so that kmonitor.bpf.c has none of it.
 *
 * libbpf (source "core"): the object file is compiled once. Tracepoints are BTF-typed, their pointers are read directly, and
 * libbpf puts in the offsets of the running kernel (CO-RE).
 *
 * bcc (source "bcc"; KMONITOR_BCC is defined): compiled on the node. Raw tracepoints, pointers read by a helper, with the offsets of the kernel's
 * headers (KMONITOR_KERNEL_HEADERS), or with those that the agent found in the kernel's BTF. The agent makes the maps, from the
 * object file, so that they are the same; bcc's own way to declare maps and to follow pointers rewrites the source text,
 * which neither macros nor inlined functions outlive. Hence descriptors as numbers, and explicit reads.
 *
 *   FIELD(pointer, type, member)    of a struct that a tracepoint gave, or that was reached from there by FIELD alone
 *   READ(pointer, type, member)     of any other
 *   ADDRESS(pointer, type, member)  where it is
 *   PROBE(name, tracepoint)         a program that is attached
 *   PROBE_COPIES(name, tracepoint)  the same, up to KMONITOR_COPIES times, with `copy` from 1 on: see take_turn
 *   ROUTINE(name)                   one that user space runs, with the words of ctx->args
 *   ANCESTOR_ID(cgroup, level)      the id of the control group at this level above another, or of itself at its own
 *   START_BOOTTIME(task)            or IN_GRAIN(of nanoseconds): in the grain that the source's look-ups have: processes are told apart by it
 */
#ifndef KMONITOR_LOADER_H
#define KMONITOR_LOADER_H

#ifdef KMONITOR_BCC

#ifdef KMONITOR_KERNEL_HEADERS
#include <linux/binfmts.h>
#include <linux/cgroup-defs.h>
#include <linux/cred.h>
#include <linux/kernfs.h>
#include <linux/mm_types.h>
#include <linux/pid.h>
#include <linux/pid_namespace.h>
#include <linux/sched.h>
#include <linux/sched/signal.h>
#include <linux/signal_types.h>
#include <linux/version.h>
#define HAS_ANCESTORS (LINUX_VERSION_CODE >= KERNEL_VERSION(6, 1, 0))
#define OFFSET(type, member) __builtin_offsetof(struct type, member)
#else
#define AS_IN_KERNEL
#include "kernel.h"
#define OFFSET(type, member) KMONITOR_OFFSET_##type##_##member /* from the kernel's BTF */
#ifdef KMONITOR_OFFSET_cgroup_ancestors
#define HAS_ANCESTORS 1
#else
#define HAS_ANCESTORS 0
#endif
#endif

#define ADDRESS(pointer, type, member) ((void *)((char *)(pointer) + OFFSET(type, member)))
#define FIELD(pointer, type, member) READ(pointer, type, member)

#if HAS_ANCESTORS
#define ANCESTOR_ID(group, level)                                                                  \
	READ(READ(READ_AT((struct cgroup **)ADDRESS(group, cgroup, ancestors) + (level)), cgroup, kn), kernfs_node, id)
#else
#define ANCESTOR_ID(group, level) READ_AT((unsigned long long *)ADDRESS(group, cgroup, ancestor_ids) + (level))
#endif

/* Processes are looked up in /proc, which tells start times in clock ticks. */
#define TICK_NS 10000000ULL
#define IN_GRAIN(ns) ((ns) / TICK_NS * TICK_NS)

#define PROBE(name, tracepoint) int name(struct bpf_raw_tracepoint_args *ctx)
#define ROUTINE(name) int name(struct bpf_raw_tracepoint_args *ctx)

#define RING(name)
#define HASH(name, key, value, entries)
#define LRU_HASH(name, key, value, entries)
#define PER_CPU_VALUE(name, value)
#define MAP(name) ((void *)bpf_pseudo_fd(1, KMONITOR_FD_##name)) /* BPF_PSEUDO_MAP_FD */
#define control (*(volatile struct kmonitor_control *)bpf_pseudo_fd(2, KMONITOR_FD_control)) /* BPF_PSEUDO_MAP_VALUE */
#define config ((struct kmonitor_config)KMONITOR_CONFIG)

#else

#include <linux/types.h>
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>

#define AS_IN_KERNEL __attribute__((preserve_access_index))
#include "kernel.h"

#define FIELD(pointer, type, member) ((pointer)->member)
#define ADDRESS(pointer, type, member) (&(pointer)->member)
#define ANCESTOR_ID(group, level)                                                                  \
	(bpf_core_field_exists(((struct cgroup *)0)->ancestors) ?                                  \
		 READ(READ(READ_AT((struct cgroup **)ADDRESS(group, cgroup, ancestors) + (level)), cgroup, kn), kernfs_node, id) : \
		 READ_AT((unsigned long long *)ADDRESS((struct cgroup___before_6_1 *)(group), cgroup, ancestor_ids) + (level)))
#define IN_GRAIN(ns) (ns)

#define PROBE(name, tracepoint)                                                                    \
	SEC("tp_btf/" #tracepoint)                                                                 \
	int name(struct bpf_raw_tracepoint_args *ctx)
#define ROUTINE(name)                                                                              \
	SEC("raw_tp")                                                                              \
	int name(struct bpf_raw_tracepoint_args *ctx)
#define HAS_ITERATORS

#define MAP_OF(name, kind, key_type, value_type, entries)                                          \
	struct {                                                                                   \
		__uint(type, kind);                                                                \
		__uint(max_entries, entries);                                                      \
		__type(key, key_type);                                                             \
		__type(value, value_type);                                                         \
	} name SEC(".maps")
#define HASH(name, key_type, value_type, entries) MAP_OF(name, BPF_MAP_TYPE_HASH, key_type, value_type, entries)
#define LRU_HASH(name, key_type, value_type, entries) MAP_OF(name, BPF_MAP_TYPE_LRU_HASH, key_type, value_type, entries)
#define PER_CPU_VALUE(name, value_type) MAP_OF(name, BPF_MAP_TYPE_PERCPU_ARRAY, __u32, value_type, 1)
#define RING(name)                                                                                 \
	struct {                                                                                   \
		__uint(type, BPF_MAP_TYPE_RINGBUF);                                                \
		__uint(max_entries, 16 * 1024 * 1024); /* set by the loader */                     \
	} name SEC(".maps")
#define MAP(name) (&name)

#include "kmonitor.h"
char LICENSE[] SEC("license") = "GPL";
volatile struct kmonitor_control control SEC(".data.control");
const volatile struct kmonitor_config config SEC(".rodata.config");

#endif

#ifdef KMONITOR_NO_COPIES /* not wanted on this kernel: they take a compiler its time */
#define MORE_COPIES(name, tracepoint)
#else
#define MORE_COPIES(name, tracepoint)                                                              \
	PROBE(name##_2, tracepoint) { return name##_copy(ctx, 2); }                                \
	PROBE(name##_3, tracepoint) { return name##_copy(ctx, 3); }
#endif
#define PROBE_COPIES(name, tracepoint)                                                             \
	static __always_inline int name##_copy(struct bpf_raw_tracepoint_args *ctx, const __u32 copy); \
	PROBE(name, tracepoint) { return name##_copy(ctx, 1); }                                    \
	MORE_COPIES(name, tracepoint)                                                              \
	static __always_inline int name##_copy(struct bpf_raw_tracepoint_args *ctx, const __u32 copy)

/*
 * Before a test that is to bound a number for the verifier. A test holds for the register that it was made on: verifiers before 6.8 do not
 * know a 32-bit copy for the same, and clang leaves a test out if one on a copy says it all. So the number is one of 64 bits, of which clang
 * knows nothing from here on: what is tested is what is used. FORGET_COUNT is for how often a loop goes round, which clang computes before
 * it and then counts down to zero: verifiers before 6.12 do not see an end to that.
 */
#define FORGET(number) asm volatile("" : "+r"(number))
#ifdef KMONITOR_BCC
#define FORGET_COUNT(number) FORGET(number)
#else
#define FORGET_COUNT(number) /* with it clang loads an offset that not every kernel has before the loop; without, it tests what counts up */
#endif

#define START_BOOTTIME(task) IN_GRAIN(FIELD(task, task_struct, start_boottime))

#define READ_AT(address)                                                                           \
	({                                                                                         \
		__typeof__(*(address)) read_value;                                                 \
		bpf_probe_read_kernel(&read_value, sizeof(read_value), address);                   \
		read_value;                                                                        \
	})
#define READ(pointer, type, member)                                                                \
	({                                                                                         \
		__typeof__(((struct type *)0)->member) read_value;                                 \
		bpf_probe_read_kernel(&read_value, sizeof(read_value), ADDRESS(pointer, type, member)); \
		read_value;                                                                        \
	})

#endif
