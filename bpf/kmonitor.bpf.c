// SPDX-License-Identifier: GPL-2.0-only
/*
 * The probe: process and thread events of one kernel, filtered, into one ring.
 *
 * Why these hooks. Raw tracepoints (BTF-typed where the kernel has BTF) cost one indirect call, are stable where kernel functions are not (they are
 * inlined and renamed), and give the task itself. sched_process_exit fires in do_exit() for every thread, before its
 * resources are given back: pid, cgroup and credentials are still there. sched_process_fork fires before the child is woken
 * for the first time: whatever the child does comes later in the ring, and a child that is to be followed is armed before
 * it runs. sched_process_exec fires after the last point at which exec can fail.
 */
#include "loader.h"
#include "kmonitor.h"

#define KMONITOR_ENDS (KMONITOR_THREAD_ABORT | KMONITOR_THREAD_EXIT | KMONITOR_PROCESS_ABORT | KMONITOR_PROCESS_EXIT)
#define SIGNAL_GROUP_EXIT 0x4 /* include/linux/sched/signal.h */
#define SIGNAL_UNKILLABLE 0x40
#define PID_NS_LEVEL_MAX 32   /* MAX_PID_NS_LEVEL, include/linux/pid_namespace.h */
#define CGROUP_LEVEL_MAX 32   /* of a control group that is watched; a process may be as deep below it as it likes */
#define PF_KERNELS_THREAD 0x4010 /* PF_IO_WORKER, PF_USER_WORKER, include/linux/sched.h: io_uring's and vhost's, within a process */

RING(events);
HASH(watched, __u32, struct kmonitor_watched, 32768); /* both sizes are set by the loader */
HASH(watched_cgroups, __u64, __u32, 1024);

struct signal_key {
	__u32 tgid; /* of the target, in the initial namespace */
	__u32 signal;
};

/* A signal that can kill, and who sent it. */
struct sent {
	__u64 start_boottime_ns; /* of the target */
	__u64 detail; /* what its siginfo has besides number and code: the first eight bytes, which are a sender's id or an address */
	__s32 code;
	__u32 flags; /* KMONITOR_F_KILLED_BY, unless the sender cannot be known; KMONITOR_F_OOM_KILLED */
	struct kmonitor_killer killer;
};

/*
 * Two maps, so that nobody who has signals sent to processes of his own by the thousands can push out who killed another's. What was sent
 * and has yet to be delivered, or was taken by a signalfd, is in `waiting`; its entry goes when the signal is delivered. What the kernel
 * has decided that a process dies of is in `killers`, from then until the process has ended: an entry there costs a process that is dying.
 */
LRU_HASH(waiting, struct signal_key, struct sent, 8192);
LRU_HASH(killers, struct signal_key, struct sent, 8192);

/* By thread id, the last SIGKILL that the kernel itself sent in its context: the out-of-memory killer says afterwards what it was for. */
struct kernel_kill {
	__u64 mm; /* of the target */
	__u32 tgid;
	__u32 pid;
	__u32 out_of_memory;
	__u32 unused;
};

LRU_HASH(kernel_kills, __u32, struct kernel_kill, 1024);

struct claim_key {
	__u64 start_boottime_ns;
	__u64 tgid;
};

/* Kernels without group_dead: which process ends were told already. */
LRU_HASH(claims, struct claim_key, __u8, 1024);

struct turn_key {
	__u64 start_boottime_ns; /* this and the next: of the thread */
	__u32 tid;
	__u32 what; /* see take_turn */
};

/* Kernels that preempt programs: what a copy before has done already. Sized by the loader. LRU: not all is taken away again. */
LRU_HASH(turns, struct turn_key, __u8, 1);

/* Of processes that have ended, by id in the initial namespace: for threads that end in the same moment, and come here later. */
struct ended_process {
	__u32 mask; /* what its own entry asked for */
	__u32 signal; /* that it died of, if it is known who sent it */
	struct sent sent; /* with the process's start time in any case */
};

LRU_HASH(ended, __u32, struct ended_process, 4096);

#define FILENAME_MAX_LEN 1024

struct exec_filename {
	char bytes[FILENAME_MAX_LEN];
	/* Unused: for structs that only functions use, this is what brings them into the object's BTF, where a test reads them. */
	struct kmonitor_process process;
	struct kmonitor_gone gone;
	struct kmonitor_record record;
};

PER_CPU_VALUE(filenames, struct exec_filename);

/* What several programs read of a task. The status is that of its process. */
#define CGROUP_ID(task) FIELD(FIELD(FIELD(FIELD(task, task_struct, cgroups), css_set, dfl_cgrp), cgroup, kn), kernfs_node, id)
#define REAL_UID(task) FIELD(FIELD(task, task_struct, cred), cred, uid).val
#define REAL_GID(task) FIELD(FIELD(task, task_struct, cred), cred, gid).val
#define STATUS(signal, leader)                                                                     \
	(FIELD(signal, signal_struct, flags) & SIGNAL_GROUP_EXIT ? FIELD(signal, signal_struct, group_exit_code) :  \
								   FIELD(leader, task_struct, exit_code))

/* What all events say of the process they are about. */
struct subject {
	__u64 start_boottime_ns;
	__u64 cgroup_id;
	__u64 match_cgroup_id;
	struct kmonitor_root root;       /* as its entry has it */
	struct kmonitor_root child_root; /* of what it forks, if follow */
	struct task_struct *task;
	struct task_struct *leader;
	__u32 tgid;
	__u32 tid;  /* this and the next three: by describe */
	__u32 ppid;
	__u32 uid;
	__u32 gid;
	__u64 waiting; /* bytes in the ring that were not released, when a record was last begun */
	__u32 process_mask; /* what its own entry asks for */
	__u32 cgroup_mask;
	__u32 follow;
};

/* An id as the scope's namespace has it, of one in the initial namespace; 0 if it is not in there. */
static __always_inline __u32 id_in_scope(__u32 id, struct pid *pid)
{
	struct upid upid = {};
	__u32 level = control.pidns_level;

	if (!config.pidns_inum)
		return id;
	if (!pid || level > PID_NS_LEVEL_MAX || READ(pid, pid, level) < level)
		return 0;
	bpf_probe_read_kernel(&upid, sizeof(upid), (struct upid *)ADDRESS(pid, pid, numbers) + level);
	if (READ(ADDRESS(upid.ns, pid_namespace, ns), ns_common, inum) != config.pidns_inum)
		return 0;
	return upid.nr;
}

/* The process or thread id of a task that a tracepoint gave. */
static __always_inline __u32 scoped_id(struct task_struct *task)
{
	return id_in_scope(FIELD(task, task_struct, pid), FIELD(task, task_struct, thread_pid));
}

/* The agent makes a thread to have this run in its own context: no file under /proc tells from inside how deep a namespace is. */
static __always_inline void learn_level(struct task_struct *agent)
{
	struct pid *pid = FIELD(agent, task_struct, thread_pid);
	struct upid upid = {};
	__u32 level = READ(pid, pid, level);

	if (level > PID_NS_LEVEL_MAX)
		return;
	bpf_probe_read_kernel(&upid, sizeof(upid), (struct upid *)ADDRESS(pid, pid, numbers) + level);
	/* Whoever else forks this moment: of those in the same namespace one is as good as the other. */
	if (READ(ADDRESS(upid.ns, pid_namespace, ns), ns_common, inum) != config.pidns_inum)
		return;
	control.pidns_level = level;
	control.pidns_inum = config.pidns_inum;
}

/*
 * The verifier walks what follows a condition before what it jumps to, and need not walk again what it has seen with less known: a value
 * that was read comes before one that is zero.
 */
#define FIRST(condition) __builtin_expect(!!(condition), 1)

/*
 * OR of the masks of the process's control group and those above it. From the top, where the kernel has a group's ancestors by their
 * level: whoever may make groups may make them as deep as he likes, below one that is watched and not above it.
 */
static __always_inline __u32 cgroup_mask(struct task_struct *task, __u64 *nearest)
{
	struct cgroup *cgroup = READ(READ(task, task_struct, cgroups), css_set, dfl_cgrp);
	__u64 own = READ(cgroup, cgroup, level);
	__u32 mask = 0;

	for (__u64 level = 0; level < CGROUP_LEVEL_MAX && level <= own; level++) {
		__u64 id = ANCESTOR_ID(cgroup, level);
		__u32 *entry = bpf_map_lookup_elem(MAP(watched_cgroups), &id);

		FORGET_COUNT(level);
		if (FIRST(entry)) {
			mask |= *entry;
			*nearest = id;
		}
	}
	return mask;
}

/* Fill `subject`; false if nobody can be interested in any event of this process. */
static __always_inline bool look_up(struct subject *subject, struct task_struct *task, __u32 any)
{
	struct kmonitor_watched *entry;

	subject->task = task;
	subject->leader = FIELD(task, task_struct, group_leader);
	subject->tgid = scoped_id(subject->leader);
	if (!subject->tgid)
		return false;
	subject->start_boottime_ns = START_BOOTTIME(subject->leader);
	subject->match_cgroup_id = 0;
	subject->process_mask = 0;
	subject->cgroup_mask = 0;
	subject->follow = 0;
	__builtin_memset(&subject->root, 0, sizeof(subject->root));
	__builtin_memset(&subject->child_root, 0, sizeof(subject->child_root));
	if (FIRST(any & KMONITOR_ANY_WATCHED)) {
		entry = bpf_map_lookup_elem(MAP(watched), &subject->tgid);
		/* Another start time: the pid was given out again. Not the process that was meant. */
		if (FIRST(entry) && FIRST(!entry->start_boottime_ns || entry->start_boottime_ns == subject->start_boottime_ns)) {
			subject->process_mask = entry->mask;
			subject->follow = entry->flags & KMONITOR_WATCHED_FOLLOW;
			subject->root = entry->root;
			if (entry->flags & KMONITOR_WATCHED_ROOT || !entry->root.tgid) {
				subject->child_root.start_boottime_ns = subject->start_boottime_ns;
				subject->child_root.tgid = subject->tgid;
				subject->child_root.armed = entry->armed;
			} else {
				subject->child_root = entry->root;
			}
		}
	}
	if (FIRST(any & KMONITOR_ANY_CGROUP))
		subject->cgroup_mask = cgroup_mask(task, &subject->match_cgroup_id);
	return subject->process_mask | subject->cgroup_mask | control.all_mask;
}

/* Which of `bits` somebody wants to know. In one test, where matches is several: see describe. */
static __always_inline __u32 wanted(const struct subject *subject, __u32 bits)
{
	return bits & (subject->process_mask | subject->cgroup_mask | control.all_mask);
}

static __always_inline __u16 matches(const struct subject *subject, __u32 bit)
{
	return (subject->process_mask & bit ? KMONITOR_F_MATCH_PROCESS : 0) | (control.all_mask & bit ? KMONITOR_F_MATCH_NODE : 0) |
	       (subject->cgroup_mask & bit ? KMONITOR_F_MATCH_CGROUP : 0);
}

/*
 * What all records say of the subject, besides what look_up has found: of those that will have one, and once. From 6.2 on the verifier
 * searches all the kernel's types by name, up to four times, for each pointer that is read from one that it trusts, on each path that
 * it walks: most of the time that loading takes. So the pointers are followed here, and not where records are made, of which there are several.
 */
static __always_inline void describe(struct subject *subject)
{
	struct task_struct *task = subject->task;

	subject->tid = scoped_id(task);
	subject->cgroup_id = CGROUP_ID(task);
	subject->ppid = scoped_id(FIELD(FIELD(subject->leader, task_struct, real_parent), task_struct, group_leader));
	subject->uid = REAL_UID(task);
	subject->gid = REAL_GID(task);
}

#define TURN_BITS 2

/*
 * Whether this copy of a program is the one that does the work; false if one before has. `what` is KMONITOR_SKIPPED_*, and above TURN_BITS
 * what makes it another turn of the same thread.
 *
 * The kernel skips a program that is at work on this CPU already. From 7.0 on tracepoints may be preempted, and then that happens: one
 * thread forks, is preempted in the midst of kmonitor_fork, and the next one forks too. So there are copies: the kernel keeps the books of
 * each by itself, and runs them one after the other, in the thread that they are about. What is lost is what it skips all of: what it has
 * counted for the first, less what the others have found not done and made good (agent/kmonitor/agent/misses.py).
 */
static __always_inline bool take_turn(struct task_struct *task, __u32 what, const __u32 copy)
{
	struct turn_key key = {};
	__u8 one = 1;

	if (config.copies < 2)
		return true;
	key.start_boottime_ns = FIELD(task, task_struct, start_boottime);
	key.tid = FIELD(task, task_struct, pid);
	key.what = what;
	if (copy > 1) {
		if (bpf_map_lookup_elem(MAP(turns), &key)) {
			if (copy == config.copies)
				bpf_map_delete_elem(MAP(turns), &key);
			return false;
		}
		__sync_fetch_and_add(&control.made_good[what & ((1 << TURN_BITS) - 1)], 1);
	}
	if (copy < config.copies)
		bpf_map_update_elem(MAP(turns), &key, &one, BPF_ANY);
	return true;
}

static __always_inline void count_lost(__u16 flags, __u32 bit)
{
	__u32 class = flags & KMONITOR_F_MATCH_PROCESS ? KMONITOR_LOST_PROCESS : KMONITOR_LOST_NODE;
	__u32 index;

	switch (bit) {
	case KMONITOR_THREAD_CREATE: index = 0; break;
	case KMONITOR_THREAD_ABORT: index = 1; break;
	case KMONITOR_THREAD_EXIT: index = 2; break;
	case KMONITOR_PROCESS_FORK: index = 3; break;
	case KMONITOR_PROCESS_ABORT: index = 4; break;
	case KMONITOR_PROCESS_EXEC: index = 5; break;
	case KMONITOR_PROCESS_EXIT: index = 6; break;
	default: index = KMONITOR_LOST_FOLLOW; break;
	}
	/* One counter for all CPUs: a full ring's own lock is what costs here, and one that the agent can read as memory. */
	__sync_fetch_and_add(&control.lost[class][index], 1);
}

/* A record with room for `size` bytes, all but what is the event type's own filled in; NULL if it was counted as lost. After `describe`. */
static __always_inline struct kmonitor_record *begin(struct subject *subject, __u16 flags, __u32 bit, const __u64 size)
{
	struct kmonitor_record *record;
	struct task_struct *named;
	/* The ends of watched processes are the last to go; execs, of which one may take 4 KiB, and forks are not before them. */
	bool first_to_go = !(bit & (KMONITOR_PROCESS_ABORT | KMONITOR_PROCESS_EXIT)) || !(flags & KMONITOR_F_MATCH_PROCESS);

	subject->waiting = bpf_ringbuf_query(MAP(events), BPF_RB_AVAIL_DATA);
	if (first_to_go && subject->waiting > config.fill_mark) {
		count_lost(flags, bit);
		return NULL;
	}
	record = bpf_ringbuf_reserve(MAP(events), size, 0);
	if (!record) {
		count_lost(flags, bit);
		return NULL;
	}
	/* A thread's event names the thread; a process's the process, whichever thread did it. */
	named = bit < KMONITOR_PROCESS_FORK ? subject->task : subject->leader;
	record->version = KMONITOR_RECORD_VERSION;
	record->type = bit;
	record->flags = flags;
	record->filename_len = 0;
	record->args_len = 0;
	record->boottime_ns = bpf_ktime_get_boot_ns();
	record->start_boottime_ns = subject->start_boottime_ns;
	record->cgroup_id = subject->cgroup_id;
	record->match_cgroup_id = subject->match_cgroup_id;
	record->tgid = subject->tgid;
	record->tid = subject->tid;
	record->ppid = subject->ppid;
	record->uid = subject->uid;
	record->gid = subject->gid;
	record->status = 0;
	bpf_probe_read_kernel(record->comm, sizeof(record->comm), ADDRESS(named, task_struct, comm));
	__builtin_memset(&record->killer, 0, sizeof(record->killer));
	record->root = subject->root;
	return record;
}

/*
 * A wake-up costs more than the event. The reader says when it sleeps; the flag is read after the reserve, whose lock orders
 * it against the reader, which sets it and then looks for reserved records once more. While it naps, to gather what comes, it is woken
 * when that is much, and for what is urgent: the wake-up stays with its descriptor, also if it does not sleep this moment.
 */
static __always_inline void commit(struct kmonitor_record *record, __u64 waiting, bool urgent)
{
	bool wake = control.sleeping || waiting > control.wake_above || (urgent && !control.calm);

	bpf_ringbuf_submit(record, wake ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP);
}

PROBE_COPIES(kmonitor_fork, sched_process_fork)
{
	struct task_struct *parent = (struct task_struct *)ctx->args[0];
	struct task_struct *child = (struct task_struct *)ctx->args[1];
	__u32 any = control.any_mask;
	bool thread = FIELD(child, task_struct, tgid) == FIELD(parent, task_struct, tgid);
	__u32 bit = thread ? KMONITOR_THREAD_CREATE : KMONITOR_PROCESS_FORK;
	struct kmonitor_record *record;
	struct subject subject;
	bool told;

	if (any & KMONITOR_ANY_LEARN)
		learn_level(parent);
	if (!(any & bit) || !take_turn(child, KMONITOR_SKIPPED_FORK, copy) || !look_up(&subject, parent, any))
		return 0;
	told = wanted(&subject, bit);
	if (told)
		describe(&subject);
	if (!thread && subject.follow) {
		struct kmonitor_watched entry = {
			.start_boottime_ns = START_BOOTTIME(child),
			.mask = subject.process_mask,
			.flags = KMONITOR_WATCHED_FOLLOW,
			.root = subject.child_root,
		};
		__u32 tgid = scoped_id(child);

		if (tgid && bpf_map_update_elem(MAP(watched), &tgid, &entry, BPF_ANY))
			count_lost(KMONITOR_F_MATCH_PROCESS, 0);
	}
	if (!told)
		return 0;
	record = begin(&subject, matches(&subject, bit), bit, sizeof(*record));
	if (!record)
		return 0;
	record->child.start_boottime_ns = START_BOOTTIME(child);
	record->child.tid = scoped_id(child);
	record->child.tgid = thread ? subject.tgid : record->child.tid;
	commit(record, subject.waiting, false);
	return 0;
}

/* The record's size must be a constant: it is one of three, by what there is to say. */
static __always_inline void emit_exec(struct subject *subject, __u16 flags, struct exec_filename *filename, __u64 filename_len,
				      unsigned long args, __u64 args_len, const __u32 room)
{
	struct kmonitor_record *record = begin(subject, flags, KMONITOR_PROCESS_EXEC, KMONITOR_RECORD_SIZE + room);
	const __u64 filename_room = room >= 2 * FILENAME_MAX_LEN ? FILENAME_MAX_LEN : room / 2;
	const __u64 left = room - filename_room; /* a constant: what the verifier can see is within the record */

	if (!record)
		return;
	FORGET(filename_len);
	if (filename_len > filename_room) {
		filename_len = filename_room;
		record->flags |= KMONITOR_F_ARGS_TRUNCATED;
	}
	if (bpf_probe_read_kernel(record->tail, filename_len, filename->bytes))
		filename_len = 0;
	FORGET(args_len);
	if (args_len > left) {
		args_len = left;
		record->flags |= KMONITOR_F_ARGS_TRUNCATED;
	}
	FORGET(filename_len);
	if (filename_len <= filename_room && bpf_probe_read_user(record->tail + filename_len, args_len, (void *)args)) {
		/* Never seen, but a page of the new stack may be gone again under memory pressure. */
		args_len = 0;
		record->flags |= KMONITOR_F_ARGS_TRUNCATED;
	}
	record->filename_len = filename_len;
	record->args_len = args_len;
	commit(record, subject->waiting, false);
}

#define TAIL_SMALL (1 * KMONITOR_SLOT_SIZE)
#define TAIL_MEDIUM (5 * KMONITOR_SLOT_SIZE)
#define TAIL_LARGE (31 * KMONITOR_SLOT_SIZE)

PROBE_COPIES(kmonitor_exec, sched_process_exec) /* task, its id before, what is executed */
{
	struct task_struct *task = (struct task_struct *)ctx->args[0];
	struct linux_binprm *bprm = (struct linux_binprm *)ctx->args[2];
	__u32 any = control.any_mask;
	struct exec_filename *filename;
	struct subject subject;
	struct mm_struct *mm;
	unsigned long args;
	__u64 args_len;
	long filename_len;
	__u32 zero = 0;
	__u16 flags = 0;

	if (!(any & KMONITOR_PROCESS_EXEC))
		return 0;
	if (!take_turn(task, KMONITOR_SKIPPED_EXEC | (__u32)FIELD(task, task_struct, self_exec_id) << TURN_BITS, copy))
		return 0;
	if (!look_up(&subject, task, any))
		return 0;
	filename = bpf_map_lookup_elem(MAP(filenames), &zero);
	if (!wanted(&subject, KMONITOR_PROCESS_EXEC) || !filename)
		return 0;
	describe(&subject);
	mm = FIELD(task, task_struct, mm);
	args = FIELD(mm, mm_struct, arg_start);
	args_len = FIELD(mm, mm_struct, arg_end) - args;
	filename_len = bpf_probe_read_kernel_str(filename->bytes, sizeof(filename->bytes), FIELD(bprm, linux_binprm, filename));
	if (filename_len < 0)
		filename_len = 0;
	if (filename_len == sizeof(filename->bytes))
		flags |= KMONITOR_F_ARGS_TRUNCATED;
	flags |= matches(&subject, KMONITOR_PROCESS_EXEC);
	if (filename_len <= TAIL_SMALL / 2 && args_len <= TAIL_SMALL / 2)
		emit_exec(&subject, flags, filename, filename_len, args, args_len, TAIL_SMALL);
	else if (filename_len <= TAIL_MEDIUM / 2 && args_len <= TAIL_MEDIUM / 2)
		emit_exec(&subject, flags, filename, filename_len, args, args_len, TAIL_MEDIUM);
	else
		emit_exec(&subject, flags, filename, filename_len, args, args_len, TAIL_LARGE);
	return 0;
}

/* Whether this thread's end is the process's end, for kernels that do not say so. */
static __always_inline bool claim_end(const struct subject *subject, struct signal_struct *signal)
{
	struct claim_key key = {.start_boottime_ns = subject->start_boottime_ns, .tgid = FIELD(subject->leader, task_struct, tgid)};
	__u8 one = 1;

	/* Two threads that end at once may both see zero here: the first to claim tells. */
	return FIELD(signal, signal_struct, live).counter == 0 && !bpf_map_update_elem(MAP(claims), &key, &one, BPF_NOEXIST);
}

#define SIGILL 4
#define SIGTRAP 5
#define SIGBUS 7
#define SIGFPE 8
#define SIGKILL 9
#define SIGSEGV 11
#define SIGALRM 14
#define SIGCHLD 17
#define SIGCONT 18
#define SIGSTOP 19
#define SIGTTOU 22
#define SIGURG 23
#define SIGWINCH 28
#define SIGPOLL 29
#define SIGSYS 31
#define SIGNAL_MAX 64
#define HARMLESS (1ULL << SIGCHLD | 1ULL << SIGCONT | 1ULL << SIGSTOP | 3ULL << 20 | 1ULL << SIGTTOU | 1ULL << SIGURG | 1ULL << SIGWINCH)
/* Those with codes of their own, by which the kernel says why it sends them. */
#define CODED (1U << SIGILL | 1U << SIGTRAP | 1U << SIGBUS | 1U << SIGFPE | 1U << SIGSEGV | 1U << SIGPOLL | 1U << SIGSYS)

/* Of include/linux/signal.h: in place of a siginfo. */
#define SEND_SIG_NOINFO 0
#define SEND_SIG_PRIV 1
/* Of include/uapi/asm-generic/siginfo.h. */
#define SI_KERNEL 0x80
#define SI_TIMER (-2)
#define SI_ASYNCIO (-4)
#define SI_SIGIO (-5)

static __always_inline bool can_kill(int sig)
{
	return sig > 0 && sig <= SIGNAL_MAX && (sig == SIGNAL_MAX || !(HARMLESS & (1ULL << sig)));
}

/*
 * Copy who sent a signal, if the entry is for this very process. These maps give an element to another key as soon as they need it: if it
 * is still the key's after it was copied, it was the key's all the time.
 */
static __always_inline bool find_sent(void *map, const struct signal_key *key, __u64 start_boottime_ns, struct sent *copy)
{
	struct sent *entry = bpf_map_lookup_elem(map, key);

	if (!entry)
		return false;
	*copy = *entry;
	return copy->start_boottime_ns == start_boottime_ns && bpf_map_lookup_elem(map, key) == entry;
}

#define WAITING_MAX 4 /* signals that are looked through */
#define SIGQUEUE_PREALLOC 1 /* include/linux/signal.h or sched/signal.h; only timer_create(2) makes such */

/*
 * Where nobody has written down who sent what the process dies of: KMONITOR_F_KILLED_BY if it can only have been a timer, which is the
 * kernel, else 0. A signal that kills at once is not taken from the process's queue: it is there until the process is freed. So a timer's
 * is known that went off before anybody had registered, or for which the kernel did not run kmonitor_signal: a timer goes off in whatever
 * is interrupted, and a kernel (6.18, of a virtual machine) was met that runs no BPF program at all while a certain task of its is on the
 * processor.
 *
 * A siginfo proves nothing here: a process may send itself one with whatever it likes. What it cannot make is a queue entry that belongs
 * to a timer; and for an alarm, its timer must have gone off. Any other sender stays unknown.
 *
 * Without the lock: what comes meanwhile comes last, and pointers are followed by a helper that may fail.
 */
static __always_inline __u16 of_timer(struct signal_struct *signal, int sig)
{
	struct list_head *head = ADDRESS(ADDRESS(signal, signal_struct, shared_pending), sigpending, list);
	struct list_head *next = READ(head, list_head, next);
	long long due = READ(ADDRESS(signal, signal_struct, real_timer), hrtimer, _softexpires);
	bool alarm = sig == SIGALRM && due && due <= (long long)bpf_ktime_get_ns();

	for (int i = 0; i < WAITING_MAX && next != head; i++) {
		struct sigqueue *queued = (struct sigqueue *)next;
		struct kernel_siginfo *info = ADDRESS(queued, sigqueue, info);

		if (READ(info, kernel_siginfo, si_signo) == sig)
			return READ(queued, sigqueue, flags) & SIGQUEUE_PREALLOC || (alarm && READ(info, kernel_siginfo, si_code) == SI_KERNEL) ?
				       KMONITOR_F_KILLED_BY : 0;
		next = READ(next, list_head, next);
	}
	return 0;
}

static __always_inline void emit_end(struct subject *subject, __u32 bit, __u32 status, const struct sent *sent)
{
	__u16 flags = matches(subject, bit);
	struct kmonitor_record *record;

	if (!flags)
		return;
	record = begin(subject, flags, bit, sizeof(*record));
	if (!record)
		return;
	record->status = status;
	if (status & 0x7f) {
		record->killer = sent->killer;
		record->flags |= sent->flags;
	}
	/* What failovers wait for is not left to the reader's nap. */
	commit(record, subject->waiting, bit == KMONITOR_PROCESS_EXIT && (subject->process_mask | subject->cgroup_mask));
}

PROBE_COPIES(kmonitor_exit, sched_process_exit) /* task; and from 6.16 on whether it is the last of its process */
{
	__u32 any = control.any_mask;
	struct task_struct *task = (struct task_struct *)ctx->args[0];
	struct ended_process ended_process = {};
	struct signal_struct *signal;
	struct ended_process *told;
	struct signal_key key = {};
	struct sent sent = {};
	struct subject subject;
	bool process_ends;
	bool interests;
	bool is_late; /* its process has ended, and was told */
	bool is_thread;
	__u32 thread_status;
	__u32 status;
	__u32 bits = 0; /* of the records that there may be */
	__u32 tgid;

	if (!(any & (KMONITOR_ANY_WATCHED | KMONITOR_ENDS)))
		return 0;
	if (!take_turn(task, KMONITOR_SKIPPED_EXIT, copy))
		return 0;
	interests = look_up(&subject, task, any);
	signal = FIELD(task, task_struct, signal);
	tgid = FIELD(task, task_struct, tgid);
	is_thread = (__u32)FIELD(task, task_struct, pid) != tgid;
	is_late = is_thread && FIELD(signal, signal_struct, live).counter == 0;
	if (!interests && !(is_late && subject.tgid))
		return 0;
	thread_status = FIELD(task, task_struct, exit_code);
	if (config.has_group_dead)
		process_ends = ctx->args[1] & 0xff;
	else
		process_ends = interests && claim_end(&subject, signal);
	is_late = is_late && !process_ends;
	status = STATUS(signal, subject.leader);
	key.tgid = tgid;
	/* Some are the kernel's, and nobody was told that they were made. */
	if (is_thread && !(FIELD(task, task_struct, flags) & PF_KERNELS_THREAD))
		bits |= KMONITOR_THREAD_EXIT | (thread_status & 0x7f ? KMONITOR_THREAD_ABORT : 0);
	if (process_ends)
		bits |= KMONITOR_PROCESS_EXIT | (status & 0x7f ? KMONITOR_PROCESS_ABORT : 0);
	key.signal = (process_ends ? status : thread_status) & 0x7f;
	if (is_late) {
		told = bpf_map_lookup_elem(MAP(ended), &tgid);
		if (told) {
			ended_process = *told;
			if (ended_process.sent.start_boottime_ns == subject.start_boottime_ns) {
				subject.process_mask |= ended_process.mask;
				if (ended_process.signal == key.signal)
					sent = ended_process.sent;
			}
		}
	} else if (key.signal && !find_sent(MAP(killers), &key, subject.start_boottime_ns, &sent)) {
		__builtin_memset(&sent, 0, sizeof(sent));
		sent.flags = of_timer(signal, key.signal);
	}
	bits = wanted(&subject, bits);
	if (bits) {
		describe(&subject);
		if (bits & KMONITOR_THREAD_ABORT)
			emit_end(&subject, KMONITOR_THREAD_ABORT, thread_status, &sent);
		if (bits & KMONITOR_THREAD_EXIT)
			emit_end(&subject, KMONITOR_THREAD_EXIT, thread_status, &sent);
		if (bits & KMONITOR_PROCESS_ABORT)
			emit_end(&subject, KMONITOR_PROCESS_ABORT, status, &sent);
		if (bits & KMONITOR_PROCESS_EXIT)
			emit_end(&subject, KMONITOR_PROCESS_EXIT, status, &sent);
	}
	if (!process_ends)
		return 0;
	/* Another thread may have given up its count before this one and not have come here yet: then its own end comes after the process's. */
	if (FIELD(signal, signal_struct, nr_threads) > 1 && (subject.process_mask || key.signal)) {
		ended_process.mask = subject.process_mask & (KMONITOR_THREAD_ABORT | KMONITOR_THREAD_EXIT);
		ended_process.signal = key.signal;
		ended_process.sent = sent;
		ended_process.sent.start_boottime_ns = subject.start_boottime_ns;
		bpf_map_update_elem(MAP(ended), &tgid, &ended_process, BPF_ANY);
	}
	if (subject.process_mask)
		bpf_map_delete_elem(MAP(watched), &subject.tgid);
	if (sent.start_boottime_ns)
		bpf_map_delete_elem(MAP(killers), &key);
	return 0;
}

/* Of include/trace/events/signal.h: what became of it. */
#define TRACE_SIGNAL_DELIVERED 0
#define TRACE_SIGNAL_LOSE_INFO 4

/* The entry that was queued last for a process or a thread. */
static __always_inline struct sigqueue *last_queued(struct task_struct *task, bool to_process)
{
	struct sigpending *pending = to_process ? ADDRESS(READ(task, task_struct, signal), signal_struct, shared_pending) : ADDRESS(task, task_struct, pending);

	return (struct sigqueue *)READ(ADDRESS(pending, sigpending, list), list_head, prev);
}

enum origin {
	ORIGIN_UNKNOWN,
	ORIGIN_KERNEL,
	ORIGIN_SENDER, /* who runs */
};

/*
 * Who sends a signal. A process may write what it likes into a siginfo (rt_sigqueueinfo(2), pidfd_send_signal(2)), but for one thing:
 * a code that is not negative the kernel takes from it only if the signal is for itself.
 */
static __always_inline enum origin origin_of(unsigned long info, int sig, struct task_struct *task, bool to_itself, bool to_process,
					      struct sigqueue *queued)
{
	int code;

	if (info == SEND_SIG_PRIV)
		return ORIGIN_KERNEL;
	/*
	 * In the name of who runs: of a parent that ends (PR_SET_PDEATHSIG), and of kill(2) on newer kernels (met on 7.3). To the very thread
	 * that runs it is the kernel's own doing: SIGPIPE, SIGXFSZ; tgkill(2) has a siginfo.
	 */
	if (info == SEND_SIG_NOINFO)
		return to_itself && !to_process ? ORIGIN_KERNEL : ORIGIN_SENDER;
	/* What a debugger puts in the way of a thread that blocks it is sent once more, by that thread (ptrace_signal). */
	if (to_itself && FIELD(task, task_struct, ptrace))
		return ORIGIN_UNKNOWN;
	code = READ((struct kernel_siginfo *)info, kernel_siginfo, si_code);
	/* A fault; SIGIO of a descriptor, which may be any signal (F_SETSIG). A process may make one look like its own fault, or have that fault. */
	if (code > 0)
		return !to_itself || (sig < 32 && CODED & (1U << sig)) ? ORIGIN_KERNEL : ORIGIN_UNKNOWN;
	/* A timer's siginfo is no copy: it is part of what is queued. */
	if (code == SI_TIMER)
		return (unsigned long)ADDRESS(queued, sigqueue, info) == info ? ORIGIN_KERNEL : ORIGIN_SENDER;
	/* Of a USB transfer, and of SIGIO by a signal that has codes of its own: the kernel's, in whatever is interrupted, or made by who runs. */
	if (code == SI_ASYNCIO || (code == SI_SIGIO && sig < 32 && CODED & (1U << sig)))
		return ORIGIN_UNKNOWN;
	return ORIGIN_SENDER;
}

/* Whether the out-of-memory killer runs here and kills `task` since it has the victim's memory. Else this kill is written down. */
static __always_inline bool shares_victims_memory(struct task_struct *task)
{
	__u32 me = bpf_get_current_pid_tgid();
	struct kernel_kill kill = {.mm = (unsigned long)READ(task, task_struct, mm), .tgid = FIELD(task, task_struct, tgid),
				   .pid = FIELD(task, task_struct, pid)};
	struct kernel_kill *last = bpf_map_lookup_elem(MAP(kernel_kills), &me);

	if (last && last->out_of_memory && kill.mm && last->mm == kill.mm)
		return true;
	bpf_map_update_elem(MAP(kernel_kills), &me, &kill, BPF_ANY);
	return false;
}

/* Fires with the target's signal lock held, after the kernel has decided whether this signal ends the process. */
PROBE(kmonitor_signal, signal_generate) /* number, siginfo, target, whether to the whole process, what became of it */
{
	int sig = ctx->args[0];
	unsigned long info;
	struct task_struct *task = (struct task_struct *)ctx->args[2];
	bool to_process = (int)ctx->args[3];
	int result = ctx->args[4];
	__u32 any = control.any_mask;
	struct signal_key key = {};
	struct signal_struct *signal;
	struct task_struct *sender;
	struct sigqueue *queued;
	struct subject subject;
	struct sent sent = {};
	struct sent other;
	enum origin origin;

	if (!(any & KMONITOR_ENDS) || !can_kill(sig))
		return 0;
	/* Ignored, as the target is being killed already or does not care; or pending already: who came first is who kills. */
	if (result != TRACE_SIGNAL_DELIVERED && result != TRACE_SIGNAL_LOSE_INFO)
		return 0;
	/* Not as ctx->args[1]: the verifier takes a tracepoint's pointer for one that is never NULL, and drops the branch. */
	bpf_probe_read_kernel(&info, sizeof(info), &ctx->args[1]);
	if (sig == SIGKILL && info == SEND_SIG_PRIV && shares_victims_memory(task))
		sent.flags = KMONITOR_F_OOM_KILLED;
	if (!look_up(&subject, task, any))
		return 0;
	sender = (struct task_struct *)bpf_get_current_task(); /* as a pointer that can be followed there is none before 5.11 */
	queued = last_queued(task, to_process);
	origin = origin_of(info, sig, task, READ(sender, task_struct, tgid) == FIELD(task, task_struct, tgid), to_process, queued);
	sent.start_boottime_ns = subject.start_boottime_ns;
	if (origin != ORIGIN_UNKNOWN)
		sent.flags |= KMONITOR_F_KILLED_BY;
	if (origin == ORIGIN_SENDER) {
		struct task_struct *leader = READ(sender, task_struct, group_leader);

		sent.killer.tgid = id_in_scope(READ(leader, task_struct, pid), READ(leader, task_struct, thread_pid));
		sent.killer.uid = READ(READ(sender, task_struct, cred), cred, uid).val;
		bpf_probe_read_kernel(sent.killer.comm, sizeof(sent.killer.comm), ADDRESS(leader, task_struct, comm));
	}
	key.tgid = FIELD(task, task_struct, tgid);
	key.signal = sig;
	signal = READ(task, task_struct, signal);
	if (READ(signal, signal_struct, flags) & SIGNAL_GROUP_EXIT && (READ(signal, signal_struct, group_exit_code) & 0x7f) == sig) {
		/* Kernels before 5.17 queue more signals for a process that is dying: the first one has killed it. */
		if (!find_sent(MAP(killers), &key, subject.start_boottime_ns, &other))
			bpf_map_update_elem(MAP(killers), &key, &sent, BPF_ANY);
		return 0;
	}
	/* It is blocked, or caught, or dumps core, or goes through a debugger first. As it will be delivered: see kmonitor_deliver. */
	if (result == TRACE_SIGNAL_DELIVERED && READ(ADDRESS(queued, sigqueue, info), kernel_siginfo, si_signo) == sig) {
		sent.code = READ(ADDRESS(queued, sigqueue, info), kernel_siginfo, si_code);
		sent.detail = READ_AT((__u64 *)ADDRESS(ADDRESS(queued, sigqueue, info), kernel_siginfo, _sifields));
	}
	bpf_map_update_elem(MAP(waiting), &key, &sent, BPF_ANY);
	return 0;
}

/*
 * A thread takes a signal, which it will handle, or ignore, or which ends its process: the entry is of no more use. It says who kills
 * only if the kernel has just what was sent in its hands: a debugger may have put a signal there, or changed it; and a signalfd may have
 * taken what was sent, which nothing tells.
 */
PROBE(kmonitor_deliver, signal_deliver) /* number, siginfo, action */
{
	int sig = ctx->args[0];
	unsigned long info;
	struct k_sigaction *action = (struct k_sigaction *)ctx->args[2];
	struct signal_key key = {.tgid = bpf_get_current_pid_tgid() >> 32, .signal = sig};
	struct task_struct *task;
	struct sent other;
	struct sent sent;
	__u64 start;

	if (!(control.any_mask & KMONITOR_ENDS) || !can_kill(sig))
		return 0;
	/* Each thread of a process that is dying takes SIGKILL, whatever it dies of. */
	if (sig == SIGKILL || !bpf_map_lookup_elem(MAP(waiting), &key))
		return 0;
	task = (struct task_struct *)bpf_get_current_task();
	/* SIG_DFL: it kills, but for the init of a pid namespace. */
	if (!READ(ADDRESS(action, k_sigaction, sa), sigaction, sa_handler) &&
	    !(READ(READ(task, task_struct, signal), signal_struct, flags) & SIGNAL_UNKILLABLE)) {
		start = IN_GRAIN(READ(READ(task, task_struct, group_leader), task_struct, start_boottime));
		bpf_probe_read_kernel(&info, sizeof(info), &ctx->args[1]);
		if (!find_sent(MAP(waiting), &key, start, &sent) || sent.code != READ((struct kernel_siginfo *)info, kernel_siginfo, si_code) ||
		    sent.detail != READ_AT((__u64 *)ADDRESS((struct kernel_siginfo *)info, kernel_siginfo, _sifields))) {
			/* Nobody knows who did it. An entry all the same: kernels before 5.17 queue more signals for who is dying. */
			__builtin_memset(&sent, 0, sizeof(sent));
			sent.start_boottime_ns = start;
		}
		if (!find_sent(MAP(killers), &key, start, &other))
			bpf_map_update_elem(MAP(killers), &key, &sent, BPF_ANY);
	}
	bpf_map_delete_elem(MAP(waiting), &key);
	return 0;
}

/* The out-of-memory killer sends SIGKILL, then names its victim here, then kills whoever else has the victim's memory. */
PROBE(kmonitor_oom, mark_victim)
{
	struct signal_key key = {.signal = SIGKILL};
	__u32 me = bpf_get_current_pid_tgid();
	struct kernel_kill *kill;
	struct sent *entry;
	struct sent sent;
	__u32 victim;

	if (!(control.any_mask & KMONITOR_ENDS))
		return 0;
	/* A task from 6.8 on, a thread's id before. */
	if (config.victim_is_task)
		victim = READ((struct task_struct *)ctx->args[0], task_struct, pid);
	else
		victim = ctx->args[0];
	kill = bpf_map_lookup_elem(MAP(kernel_kills), &me);
	/* One that was dying already is named too, if it has yet to give its memory back: that is not this one's doing. */
	if (!kill || kill->pid != victim)
		return 0;
	kill->out_of_memory = 1;
	key.tgid = kill->tgid;
	entry = bpf_map_lookup_elem(MAP(killers), &key);
	if (!entry)
		return 0;
	sent = *entry;
	sent.flags |= KMONITOR_F_OOM_KILLED;
	if (bpf_map_lookup_elem(MAP(killers), &key) == entry) /* see find_sent */
		bpf_map_update_elem(MAP(killers), &key, &sent, BPF_EXIST);
	return 0;
}

#define GONE(member) (ctx->args[__builtin_offsetof(struct kmonitor_gone, member) / sizeof(__u64)])

/*
 * The agent found a watched process gone whose end was not told: the ring had no room for it, or nobody captured. Its end gets a
 * record here, and not a message of the agent's, so that it has a position: it comes once, and in order. Run by the agent, attached
 * nowhere. Nothing is counted as lost if there is no room: the agent tries again.
 */
ROUTINE(kmonitor_infer)
{
	__u64 start_boottime_ns = GONE(start_boottime_ns);
	struct kmonitor_watched *entry;
	struct kmonitor_record *record;
	__u32 tgid = GONE(tgid);

	record = bpf_ringbuf_reserve(MAP(events), sizeof(*record), 0);
	if (!record)
		return 0;
	__builtin_memset(&record->killer, 0, sizeof(record->killer));
	__builtin_memset(&record->root, 0, sizeof(record->root));
	entry = bpf_map_lookup_elem(MAP(watched), &tgid);
	/* The pid may be another's by now, with an entry of its own. */
	if (entry && entry->start_boottime_ns == start_boottime_ns) {
		record->root = entry->root;
		bpf_map_delete_elem(MAP(watched), &tgid);
	}
	record->version = KMONITOR_RECORD_VERSION;
	record->type = KMONITOR_PROCESS_EXIT;
	record->flags = KMONITOR_F_INFERRED | KMONITOR_F_MATCH_PROCESS;
	record->filename_len = 0;
	record->args_len = 0;
	record->boottime_ns = bpf_ktime_get_boot_ns();
	record->start_boottime_ns = start_boottime_ns;
	record->cgroup_id = GONE(cgroup_id);
	record->match_cgroup_id = 0;
	record->tgid = tgid;
	record->tid = tgid;
	record->ppid = GONE(ppid) >> 32;
	record->uid = GONE(uid);
	record->gid = GONE(gid) >> 32;
	record->status = 0;
	*(__u64 *)record->comm = GONE(comm[0]);
	*(__u64 *)(record->comm + sizeof(__u64)) = GONE(comm[8]);
	commit(record, 0, true);
	return 1;
}

#ifdef HAS_ITERATORS
/* Every process of the agent's namespace, for look-ups: the same start times and ids as in the events. */
SEC("iter/task")
int kmonitor_tasks(struct bpf_iter__task *ctx)
{
	struct task_struct *task = ctx->task;
	struct kmonitor_process process = {};
	struct signal_struct *signal;
	const struct cred *cred;

	if (!task || task->pid != task->tgid)
		return 0;
	process.tgid = scoped_id(task);
	if (!process.tgid)
		return 0;
	signal = task->signal;
	process.start_boottime_ns = START_BOOTTIME(task);
	/* READ for the verifier's sake: see describe. */
	process.cgroup_id = READ(READ(READ(READ(task, task_struct, cgroups), css_set, dfl_cgrp), cgroup, kn), kernfs_node, id);
	process.ppid = scoped_id(task->real_parent->group_leader);
	cred = READ(task, task_struct, cred);
	process.uid = READ(cred, cred, uid).val;
	process.gid = READ(cred, cred, gid).val;
	process.live = signal->live.counter;
	process.status = STATUS(signal, task);
	bpf_probe_read_kernel(process.comm, sizeof(process.comm), task->comm);
	bpf_seq_write(ctx->meta->seq, &process, sizeof(process));
	return 0;
}
#endif
