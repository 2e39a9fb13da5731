/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * The record, the masks and the maps' values: what the probe (kmonitor.bpf.c) and user space
 * (proto/kmonitor/wire/record.py, agent/kmonitor/agent/maps.py) share. A test compares both through the object's BTF.
 *
 * All integers are little-endian and naturally aligned; there is no implicit padding.
 */
#ifndef KMONITOR_H
#define KMONITOR_H

#define KMONITOR_RECORD_VERSION 1

/*
 * Fixed for ever, since an agent of any version must be able to bring home what the probe of any other has left in its pinned ring, and
 * to stop that probe (agent/kmonitor/agent/predecessor.py; a test holds these):
 *
 * - the names of the pins: NODE@SCOPE@vN, where N is KMONITOR_RECORD_VERSION; in it map_events, map_control, and link_* for all that is
 *   attached;
 * - the ring: a BPF_MAP_TYPE_RINGBUF, and what it holds: whole slots of KMONITOR_SLOT_SIZE, a record's first byte behind the ring's header
 *   its version;
 * - in struct kmonitor_control: any_mask, which makes the probe do nothing when it is 0; sleeping; epoch; object_crc; lost. What is new goes
 *   behind them.
 *
 * All else may differ: the rest of the record, other maps, their keys and values.
 */

/* Every record, with the ring's own header of 8 bytes before it, takes a whole number of slots.
 * So a stretch of the ring is an array of slots, and its positions are multiples of the slot. */
#define KMONITOR_SLOT_SIZE 128
#define KMONITOR_RING_HEADER_SIZE 8
#define KMONITOR_RECORD_SIZE 120 /* the fixed part: one slot less the ring's header */

/* Event bits: those of the 2004 driver. A record has exactly one. */
#define KMONITOR_THREAD_CREATE 0x01
#define KMONITOR_THREAD_ABORT 0x02
#define KMONITOR_THREAD_EXIT 0x04
#define KMONITOR_PROCESS_FORK 0x08
#define KMONITOR_PROCESS_ABORT 0x10
#define KMONITOR_PROCESS_EXEC 0x20
#define KMONITOR_PROCESS_EXIT 0x40
#define KMONITOR_EVENT_MASK 0x7f

/* In control.any_mask beside the event bits: the exit probe must run to forget watched processes. */
#define KMONITOR_ANY_WATCHED 0x100
/* ... and some cgroup is watched. */
#define KMONITOR_ANY_CGROUP 0x200
/* ... and the fork probe is to find out how deep config.pidns_inum is. */
#define KMONITOR_ANY_LEARN 0x400

/* record.flags */
#define KMONITOR_F_ARGS_TRUNCATED 0x0001
#define KMONITOR_F_OOM_KILLED 0x0002
#define KMONITOR_F_KILLED_BY 0x0004   /* the killer's fields are set */
#define KMONITOR_F_MATCH_PROCESS 0x0010 /* this bit was asked for by the process's own entry */
#define KMONITOR_F_MATCH_NODE 0x0020    /* ... by the node-wide mask */
#define KMONITOR_F_MATCH_CGROUP 0x0040  /* ... by the mask of match_cgroup_id or of a cgroup above it */
#define KMONITOR_F_INFERRED 0x0080      /* made by the agent: found, not seen; an exit has no status */

struct kmonitor_child {
	unsigned long long start_boottime_ns; /* of the child process; of the thread itself for a thread */
	unsigned int tgid;
	unsigned int tid;
};

/* Where a process that is followed has its entry from: the nearest process above it that was registered itself. */
struct kmonitor_root {
	unsigned long long start_boottime_ns;
	unsigned int tgid;  /* 0: not known, or nothing above it is followed */
	unsigned int armed; /* kmonitor_watched.armed of the root when the fork out of it was made */
};

struct kmonitor_killer {
	unsigned int tgid; /* 0: the kernel */
	unsigned int uid;
	char comm[16];
};

struct kmonitor_record {
	unsigned char version;
	unsigned char type; /* one event bit */
	unsigned short flags;
	unsigned short filename_len; /* exec: bytes at tail, with the ending NUL */
	unsigned short args_len;     /* exec: bytes behind the file name, each argument ended by NUL */
	unsigned long long boottime_ns;
	unsigned long long start_boottime_ns; /* of the process: of its leader */
	unsigned long long cgroup_id;         /* in the v2 hierarchy */
	unsigned long long match_cgroup_id;   /* the nearest watched one at or above it, or 0 */
	unsigned int tgid;
	unsigned int tid;
	unsigned int ppid;
	unsigned int uid;
	unsigned int gid;
	unsigned int status; /* exit, abort: as waitpid(2) would say it */
	char comm[16];
	union {
		struct kmonitor_child child;   /* fork, thread create */
		struct kmonitor_killer killer; /* exit, abort, with KMONITOR_F_KILLED_BY */
	};
	struct kmonitor_root root; /* of this process; zero unless its own entry was copied at a fork */
	char tail[]; /* exec */
};

/* Map "watched": tgid -> */
struct kmonitor_watched {
	unsigned long long start_boottime_ns; /* of the process the entry is for; 0 matches any */
	unsigned int mask;
	unsigned int flags;
	struct kmonitor_root root; /* zero unless the entry was copied at a fork */
	unsigned int armed; /* the agent's number of the change that last armed it for a registration of its own */
	unsigned int unused;
};
#define KMONITOR_WATCHED_FOLLOW 0x1
/* 0x2 is not used any more. */
/* Registered itself, whatever it was copied from: the root of what it forks from now on. */
#define KMONITOR_WATCHED_ROOT 0x4

/* Losses are counted apart for what a process's own entry asked for, so that a monitor of
 * one process is not told of losses that cannot be its own. */
#define KMONITOR_LOST_NODE 0
#define KMONITOR_LOST_PROCESS 1
#define KMONITOR_LOST_CLASSES 2
/* [class][bit number of the event]; [class][7]: children that could not be followed (map full). */
#define KMONITOR_LOST_FOLLOW 7
#define KMONITOR_LOST_TYPES 8

#define KMONITOR_SKIPPED_FORK 0
#define KMONITOR_SKIPPED_EXEC 1
#define KMONITOR_SKIPPED_EXIT 2
#define KMONITOR_SKIPPED_PROGRAMS 3

/* Map "control": one value, memory-mapped by the agent. */
struct kmonitor_control {
	unsigned int any_mask; /* the OR of every mask: tested before all else */
	unsigned int all_mask; /* node-wide */
	unsigned int sleeping; /* the reader waits and must be woken */
	unsigned int pidns_level; /* scope pidns: the namespace's depth below the initial one */
	unsigned long long epoch; /* set once, when the ring is made */
	unsigned int object_crc;  /* of the probe's object file that made it */
	unsigned int pidns_inum;  /* of the namespace that pidns_level is of; 0 if none was asked for, or found yet */
	unsigned long long lost[KMONITOR_LOST_CLASSES][KMONITOR_LOST_TYPES];
	unsigned long long wake_above; /* the reader naps: wake it when more bytes than these wait to be released */
	unsigned int calm; /* ... and not for what is urgent: there is too much of it */
	unsigned int reserved;
	/* By program, as KMONITOR_SKIPPED_* has them: runs that the kernel skipped, and that another copy made good. */
	unsigned long long made_good[KMONITOR_SKIPPED_PROGRAMS];
	/* The agent's own (misses.py), kept here for the next one: how many were skipped and not made good when it looked last... */
	long long skipped[KMONITOR_SKIPPED_PROGRAMS];
	/* ... and all that it has counted as lost for it. */
	unsigned long long missed[KMONITOR_SKIPPED_PROGRAMS];
};

#define KMONITOR_COPIES 3

/* Read-only, set between open and load. */
struct kmonitor_config {
	unsigned int pidns_inum;     /* scope pidns: the namespace's inode number; 0 is scope host */
	unsigned int has_group_dead; /* sched_process_exit has the argument group_dead (6.16 and later) */
	unsigned int victim_is_task; /* mark_victim gives a task and not a thread's id (6.8 and later) */
	unsigned int fill_mark;      /* bytes waiting in the ring above which all is dropped but ends of watched processes */
	unsigned int copies;         /* of the programs that make records, attached to the same tracepoint: 1 to KMONITOR_COPIES */
};

/*
 * What the program "kmonitor_infer" is run with (BPF_PROG_TEST_RUN, as the context of a raw tracepoint: whole words). Its result: 1,
 * a record was made; 0, the ring has no room.
 */
struct kmonitor_gone {
	unsigned long long start_boottime_ns;
	unsigned long long cgroup_id; /* this and what follows: 0, or empty, if it is not known */
	unsigned int tgid;
	unsigned int ppid;
	unsigned int uid;
	unsigned int gid;
	char comm[16];
};

/* What the iterator "kmonitor_tasks" prints: one of these for each process. */
struct kmonitor_process {
	unsigned long long start_boottime_ns;
	unsigned long long cgroup_id;
	unsigned int tgid;
	unsigned int ppid;
	unsigned int uid;
	unsigned int gid;
	unsigned int live; /* threads that have not ended; 0 is a zombie */
	unsigned int status; /* of a zombie: as waitpid(2) would say it */
	char comm[16];
};

#endif
