// SPDX-License-Identifier: GPL-2.0-only
/*
 * The probe: process and thread events of one kernel, filtered, into one ring.
 *
 * Why these hooks. The BTF-typed raw tracepoints cost one indirect call, are stable where kernel functions are not (they are
 * inlined and renamed), and give the task itself. sched_process_exit fires in do_exit() for every thread, before its
 * resources are given back: pid, cgroup and credentials are still there. sched_process_fork fires before the child is woken
 * for the first time: whatever the child does comes later in the ring, and a child that is to be followed is armed before
 * it runs. sched_process_exec fires after the last point at which exec can fail.
 */
#include <linux/types.h>
#include <linux/bpf.h>
#include <bpf/bpf_helpers.h>
#include <bpf/bpf_core_read.h>
#include <bpf/bpf_tracing.h>

#include "kernel.h"
#include "kmonitor.h"

char LICENSE[] SEC("license") = "GPL";

#define KMONITOR_ENDS (KMONITOR_THREAD_ABORT | KMONITOR_THREAD_EXIT | KMONITOR_PROCESS_ABORT | KMONITOR_PROCESS_EXIT)
#define SIGNAL_GROUP_EXIT 0x4 /* include/linux/sched/signal.h */
#define PID_NS_LEVEL_MAX 32   /* MAX_PID_NS_LEVEL, include/linux/pid_namespace.h */
#define CGROUP_DEPTH_MAX 16   /* levels above a process that are looked up: deeper trees match less far up */

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 16 * 1024 * 1024); /* set by the loader */
} events SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 32768); /* set by the loader */
	__type(key, __u32);
	__type(value, struct kmonitor_watched);
} watched SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 1024);
	__type(key, __u64);
	__type(value, __u32);
} watched_cgroups SEC(".maps");

struct killer_key {
	__u32 tgid; /* of the target, in the initial namespace */
	__u32 signal;
};

struct killer_entry {
	__u64 start_boottime_ns; /* of the target */
	__u16 flags; /* KMONITOR_F_KILLED_BY, and KMONITOR_F_OOM_KILLED where it is so */
	struct kmonitor_killer killer;
};

/* Who last sent a signal that can kill, by target and signal: several may wait at once, and which one kills is known at the
 * end only. LRU: a target that survives is forgotten in time. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct killer_key);
	__type(value, struct killer_entry);
} killers SEC(".maps");

struct claim_key {
	__u64 start_boottime_ns;
	__u64 tgid;
};

/* Kernels without group_dead: which process ends were told already. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 1024);
	__type(key, struct claim_key);
	__type(value, __u8);
} claims SEC(".maps");

/* Watched processes that ended with threads that had yet to be released: tgid of the initial namespace -> of the scope. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, __u32);
} ended SEC(".maps");

volatile struct kmonitor_control control SEC(".data.control");
const volatile struct kmonitor_config config SEC(".rodata.config");

/* What all events say of the process they are about. */
struct subject {
	__u64 start_boottime_ns;
	__u64 cgroup_id;
	__u64 match_cgroup_id;
	struct task_struct *task;
	struct task_struct *leader;
	__u32 tgid;
	__u32 tid;
	__u32 process_mask; /* what its own entry asks for */
	__u32 cgroup_mask;
	__u32 follow;
};

/* The process or thread id as the scope's namespace has it; 0 if it is not in there. */
static __always_inline __u32 scoped_id(struct task_struct *task)
{
	struct pid *pid;
	struct upid upid = {};
	__u32 level = control.pidns_level;

	if (!config.pidns_inum)
		return task->pid;
	pid = task->thread_pid;
	if (!pid || level > PID_NS_LEVEL_MAX || BPF_CORE_READ(pid, level) < level)
		return 0;
	bpf_core_read(&upid, sizeof(upid), &pid->numbers[level]);
	if (BPF_CORE_READ(upid.ns, ns.inum) != config.pidns_inum)
		return 0;
	return upid.nr;
}

/* OR of the masks of the process's control group and those above it. */
static __always_inline __u32 cgroup_mask(struct task_struct *task, __u64 *nearest)
{
	struct cgroup *cgroup = BPF_CORE_READ(task, cgroups, dfl_cgrp);
	__u32 mask = 0;

	for (int level = 0; level < CGROUP_DEPTH_MAX && cgroup; level++) {
		__u64 id = BPF_CORE_READ(cgroup, kn, id);
		__u32 *entry = bpf_map_lookup_elem(&watched_cgroups, &id);

		if (entry) {
			mask |= *entry;
			if (!*nearest)
				*nearest = id;
		}
		cgroup = BPF_CORE_READ(cgroup, self.parent, cgroup);
	}
	return mask;
}

/* Fill `subject`; false if nobody can be interested in any event of this process. */
static __always_inline bool look_up(struct subject *subject, struct task_struct *task, __u32 any)
{
	struct kmonitor_watched *entry;

	subject->task = task;
	subject->leader = task->group_leader;
	subject->tgid = scoped_id(subject->leader);
	if (!subject->tgid)
		return false;
	subject->tid = 0; /* later: few get there */
	subject->start_boottime_ns = subject->leader->start_boottime;
	subject->match_cgroup_id = 0;
	subject->process_mask = 0;
	subject->cgroup_mask = 0;
	subject->follow = 0;
	if (any & KMONITOR_ANY_WATCHED) {
		entry = bpf_map_lookup_elem(&watched, &subject->tgid);
		/* Another start time: the pid was given out again. Not the process that was meant. */
		if (entry && (!entry->start_boottime_ns || entry->start_boottime_ns == subject->start_boottime_ns)) {
			subject->process_mask = entry->mask;
			subject->follow = entry->flags & KMONITOR_WATCHED_FOLLOW;
		}
	}
	if (any & KMONITOR_ANY_CGROUP)
		subject->cgroup_mask = cgroup_mask(task, &subject->match_cgroup_id);
	return subject->process_mask | subject->cgroup_mask | control.all_mask;
}

static __always_inline __u16 matches(const struct subject *subject, __u32 bit)
{
	return (subject->process_mask & bit ? KMONITOR_F_MATCH_PROCESS : 0) | (control.all_mask & bit ? KMONITOR_F_MATCH_NODE : 0) |
	       (subject->cgroup_mask & bit ? KMONITOR_F_MATCH_CGROUP : 0);
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

/* A record with room for `size` bytes, all but what is the event type's own filled in; NULL if it was counted as lost. */
static __always_inline struct kmonitor_record *begin(struct subject *subject, __u16 flags, __u32 bit, const __u64 size)
{
	struct kmonitor_record *record;
	struct task_struct *named;
	bool first_to_go = bit < KMONITOR_PROCESS_FORK || !(flags & KMONITOR_F_MATCH_PROCESS);

	if (first_to_go && bpf_ringbuf_query(&events, BPF_RB_AVAIL_DATA) > config.fill_mark) {
		count_lost(flags, bit);
		return NULL;
	}
	record = bpf_ringbuf_reserve(&events, size, 0);
	if (!record) {
		count_lost(flags, bit);
		return NULL;
	}
	if (!subject->tid) {
		subject->tid = scoped_id(subject->task);
		subject->cgroup_id = subject->task->cgroups->dfl_cgrp->kn->id;
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
	record->ppid = scoped_id(subject->leader->real_parent->group_leader);
	record->uid = subject->task->cred->uid.val;
	record->gid = subject->task->cred->gid.val;
	record->status = 0;
	bpf_probe_read_kernel(record->comm, sizeof(record->comm), named->comm);
	__builtin_memset(&record->killer, 0, sizeof(record->killer));
	record->reserved[0] = 0;
	record->reserved[1] = 0;
	return record;
}

/*
 * A wake-up costs more than the event. The reader says when it sleeps; the flag is read after the reserve, whose lock orders
 * it against the reader, which sets it and then looks for reserved records once more.
 */
static __always_inline void commit(struct kmonitor_record *record, bool urgent)
{
	bpf_ringbuf_submit(record, control.sleeping || urgent ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP);
}

SEC("tp_btf/sched_process_fork")
int BPF_PROG(kmonitor_fork, struct task_struct *parent, struct task_struct *child)
{
	__u32 any = control.any_mask;
	bool thread = child->tgid == parent->tgid;
	__u32 bit = thread ? KMONITOR_THREAD_CREATE : KMONITOR_PROCESS_FORK;
	struct kmonitor_record *record;
	struct subject subject;
	__u16 flags;

	if (!(any & bit) || !look_up(&subject, parent, any))
		return 0;
	if (!thread && subject.follow) {
		struct kmonitor_watched entry = {
			.start_boottime_ns = child->start_boottime,
			.mask = subject.process_mask,
			.flags = KMONITOR_WATCHED_FOLLOW,
		};
		__u32 tgid = scoped_id(child);

		if (tgid && bpf_map_update_elem(&watched, &tgid, &entry, BPF_ANY))
			count_lost(KMONITOR_F_MATCH_PROCESS, 0);
	}
	flags = matches(&subject, bit);
	if (!flags)
		return 0;
	record = begin(&subject, flags, bit, sizeof(*record));
	if (!record)
		return 0;
	record->child.start_boottime_ns = child->start_boottime;
	record->child.tid = scoped_id(child);
	record->child.tgid = thread ? subject.tgid : record->child.tid;
	commit(record, false);
	return 0;
}

#define FILENAME_MAX_LEN 1024

struct filename {
	char bytes[FILENAME_MAX_LEN];
	/* Unused: for structs that only functions use, this is what brings them into the object's BTF, where a test reads them. */
	struct kmonitor_process process;
	struct kmonitor_namespace namespace;
	struct kmonitor_record record;
};

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct filename);
} filenames SEC(".maps");

/* The record's size must be a constant: it is one of three, by what there is to say. */
static __always_inline void emit_exec(struct subject *subject, __u16 flags, struct filename *filename, __u32 filename_len,
				      unsigned long args, __u64 args_len, const __u32 room)
{
	struct kmonitor_record *record = begin(subject, flags, KMONITOR_PROCESS_EXEC, KMONITOR_RECORD_SIZE + room);
	__u32 filename_room = room >= 2 * FILENAME_MAX_LEN ? FILENAME_MAX_LEN : room / 2;
	__u32 left;

	if (!record)
		return;
	if (filename_len > filename_room) {
		filename_len = filename_room;
		record->flags |= KMONITOR_F_ARGS_TRUNCATED;
	}
	if (bpf_probe_read_kernel(record->tail, filename_len, filename->bytes))
		filename_len = 0;
	left = room - filename_room; /* a constant: what the verifier can see is within the record */
	if (args_len > left) {
		args_len = left;
		record->flags |= KMONITOR_F_ARGS_TRUNCATED;
	}
	if (filename_len <= filename_room && bpf_probe_read_user(record->tail + filename_len, args_len, (void *)args)) {
		/* Never seen, but a page of the new stack may be gone again under memory pressure. */
		args_len = 0;
		record->flags |= KMONITOR_F_ARGS_TRUNCATED;
	}
	record->filename_len = filename_len;
	record->args_len = args_len;
	commit(record, false);
}

#define TAIL_SMALL (1 * KMONITOR_SLOT_SIZE)
#define TAIL_MEDIUM (5 * KMONITOR_SLOT_SIZE)
#define TAIL_LARGE (31 * KMONITOR_SLOT_SIZE)

SEC("tp_btf/sched_process_exec")
int BPF_PROG(kmonitor_exec, struct task_struct *task, int old_pid, struct linux_binprm *bprm)
{
	__u32 any = control.any_mask;
	struct filename *filename;
	struct subject subject;
	unsigned long args;
	__u64 args_len;
	long filename_len;
	__u32 zero = 0;
	__u16 flags;

	if (!(any & KMONITOR_PROCESS_EXEC) || !look_up(&subject, task, any))
		return 0;
	flags = matches(&subject, KMONITOR_PROCESS_EXEC);
	filename = bpf_map_lookup_elem(&filenames, &zero);
	if (!flags || !filename)
		return 0;
	filename_len = bpf_probe_read_kernel_str(filename->bytes, sizeof(filename->bytes), bprm->filename);
	if (filename_len < 0)
		filename_len = 0;
	if (filename_len == sizeof(filename->bytes))
		flags |= KMONITOR_F_ARGS_TRUNCATED;
	args = task->mm->arg_start;
	args_len = task->mm->arg_end - args;
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
	struct claim_key key = {.start_boottime_ns = subject->start_boottime_ns, .tgid = subject->leader->tgid};
	__u8 one = 1;

	/* Two threads that end at once may both see zero here: the first to claim tells. */
	return signal->live.counter == 0 && !bpf_map_update_elem(&claims, &key, &one, BPF_NOEXIST);
}

static __always_inline void emit_end(struct subject *subject, __u32 bit, __u32 status)
{
	__u16 flags = matches(subject, bit);
	struct kmonitor_record *record;
	struct killer_entry *entry;

	if (!flags)
		return;
	record = begin(subject, flags, bit, sizeof(*record));
	if (!record)
		return;
	record->status = status;
	if (status & 0x7f) {
		struct killer_key key = {.tgid = subject->leader->tgid, .signal = status & 0x7f};

		entry = bpf_map_lookup_elem(&killers, &key);
		if (entry && entry->start_boottime_ns == subject->start_boottime_ns) {
			record->killer = entry->killer;
			record->flags |= entry->flags;
		}
	}
	/* What failovers wait for is not left to the reader's nap. Not for whole trees: a storm would wake for each. */
	commit(record, bit == KMONITOR_PROCESS_EXIT && subject->process_mask && !subject->follow);
}

SEC("tp_btf/sched_process_exit")
int kmonitor_exit(unsigned long long *ctx)
{
	__u32 any = control.any_mask;
	struct task_struct *task = (struct task_struct *)ctx[0];
	struct signal_struct *signal;
	struct subject subject;
	struct kmonitor_watched *entry;
	bool process_ends;
	__u32 status;

	if (!(any & (KMONITOR_ANY_WATCHED | KMONITOR_ENDS)))
		return 0;
	if (!look_up(&subject, task, any))
		return 0;
	signal = task->signal;
	if (task->pid != task->tgid) {
		status = task->exit_code;
		if (status & 0x7f)
			emit_end(&subject, KMONITOR_THREAD_ABORT, status);
		emit_end(&subject, KMONITOR_THREAD_EXIT, status);
	}
	if (config.has_group_dead)
		process_ends = ctx[1] & 0xff;
	else
		process_ends = claim_end(&subject, signal);
	if (!process_ends)
		return 0;
	status = signal->flags & SIGNAL_GROUP_EXIT ? signal->group_exit_code : subject.leader->exit_code;
	if (status & 0x7f)
		emit_end(&subject, KMONITOR_PROCESS_ABORT, status);
	emit_end(&subject, KMONITOR_PROCESS_EXIT, status);
	if (subject.process_mask) {
		/*
		 * Another thread may have given up its count before this one and not have come here yet: then its own end
		 * comes after the process's. The entry stays, for threads only, until the leader is freed (kmonitor_free).
		 */
		entry = bpf_map_lookup_elem(&watched, &subject.tgid);
		if (entry && signal->nr_threads > 1) {
			__u32 tgid = task->tgid;

			entry->mask &= KMONITOR_THREAD_ABORT | KMONITOR_THREAD_EXIT;
			entry->flags = KMONITOR_WATCHED_ENDED;
			bpf_map_update_elem(&ended, &tgid, &subject.tgid, BPF_ANY);
		} else {
			bpf_map_delete_elem(&watched, &subject.tgid);
		}
	}
	return 0;
}

/* A leader is freed when it was waited for and no thread of its group is left. Its ids are gone by then: hence the map. */
SEC("tp_btf/sched_process_free")
int BPF_PROG(kmonitor_free, struct task_struct *task)
{
	__u32 tgid = task->tgid;
	struct kmonitor_watched *entry;
	__u32 *scoped;

	if (!(control.any_mask & KMONITOR_ANY_WATCHED) || task->pid != task->tgid)
		return 0;
	scoped = bpf_map_lookup_elem(&ended, &tgid);
	if (!scoped)
		return 0;
	entry = bpf_map_lookup_elem(&watched, scoped);
	if (entry && entry->start_boottime_ns == task->start_boottime)
		bpf_map_delete_elem(&watched, scoped);
	bpf_map_delete_elem(&ended, &tgid);
	return 0;
}

#define SIGKILL 9
#define SIGCHLD 17
#define SIGCONT 18
#define SIGSTOP 19
#define SIGTTOU 22
#define SIGURG 23
#define SIGWINCH 28
#define HARMLESS (1ULL << SIGCHLD | 1ULL << SIGCONT | 1ULL << SIGSTOP | 3ULL << 20 | 1ULL << SIGTTOU | 1ULL << SIGURG | 1ULL << SIGWINCH)
#define SIGNAL_MAX 64
#define SEND_SIG_NOINFO 0
#define SEND_SIG_PRIV 1
#define SI_TIMER -2 /* include/uapi/asm-generic/siginfo.h */
#define SI_ASYNCIO -4
#define TRACE_SIGNAL_DELIVERED 0 /* include/trace/events/signal.h */
#define TRACE_SIGNAL_LOSE_INFO 4

SEC("tp_btf/signal_generate")
int BPF_PROG(kmonitor_signal, int sig, struct kernel_siginfo *info, struct task_struct *task, int group, int result)
{
	__u32 any = control.any_mask;
	struct killer_entry entry = {};
	struct task_struct *sender;
	struct subject subject;
	struct killer_key key;
	int code;

	if (!(any & KMONITOR_ENDS))
		return 0;
	if (sig <= 0 || sig > SIGNAL_MAX || (sig < SIGNAL_MAX && (HARMLESS & (1ULL << sig))))
		return 0;
	/* Not one that is ignored, that comes when the target is dying of another one, or that waited already: the first sender's
	 * is the one that counts. */
	if (result != TRACE_SIGNAL_DELIVERED && result != TRACE_SIGNAL_LOSE_INFO)
		return 0;
	if (!look_up(&subject, task, any))
		return 0;
	entry.start_boottime_ns = subject.start_boottime_ns;
	entry.flags = KMONITOR_F_KILLED_BY;
	code = 0;
	if ((unsigned long)info == SEND_SIG_PRIV)
		code = 1;
	else if ((unsigned long)info != SEND_SIG_NOINFO)
		bpf_core_read(&code, sizeof(code), &info->si_code);
	/* Above 0 it is the kernel that sends: a fault, an alarm, a terminal (sigaction(2)). These two are sent in an interrupt, in
	 * the middle of whoever runs there. */
	if (code <= 0 && code != SI_TIMER && code != SI_ASYNCIO) {
		sender = (struct task_struct *)bpf_get_current_task_btf();
		entry.killer.tgid = scoped_id(sender->group_leader);
		entry.killer.uid = sender->cred->uid.val;
		bpf_probe_read_kernel(entry.killer.comm, sizeof(entry.killer.comm), sender->group_leader->comm);
	}
	key.tgid = task->tgid;
	key.signal = sig;
	bpf_map_update_elem(&killers, &key, &entry, BPF_ANY);
	return 0;
}

/* The out-of-memory killer sends SIGKILL, then names its victim here: the entry is there already. */
SEC("tp_btf/mark_victim")
int kmonitor_oom(unsigned long long *ctx)
{
	struct killer_key key = {.signal = SIGKILL};
	struct killer_entry *entry;

	if (!(control.any_mask & KMONITOR_ENDS))
		return 0;
	/* A task from 6.8 on, a thread's id before; the victim is a process's leader almost always. */
	if (config.victim_is_task)
		key.tgid = BPF_CORE_READ((struct task_struct *)ctx[0], tgid);
	else
		key.tgid = ctx[0];
	entry = bpf_map_lookup_elem(&killers, &key);
	/* One that somebody has killed already is named too, if it has yet to give its memory back: that is not the kernel's doing. */
	if (entry && !entry->killer.tgid && !entry->killer.comm[0])
		entry->flags |= KMONITOR_F_OOM_KILLED;
	return 0;
}

/* Every process of the agent's namespace, for look-ups: the same start times and ids as in the events. */
SEC("iter/task")
int kmonitor_tasks(struct bpf_iter__task *ctx)
{
	struct task_struct *task = ctx->task;
	struct kmonitor_process process = {};
	struct signal_struct *signal;

	if (!task || task->pid != task->tgid)
		return 0;
	process.tgid = scoped_id(task);
	if (!process.tgid)
		return 0;
	signal = task->signal;
	process.start_boottime_ns = task->start_boottime;
	process.cgroup_id = task->cgroups->dfl_cgrp->kn->id;
	process.ppid = scoped_id(task->real_parent->group_leader);
	process.uid = task->cred->uid.val;
	process.gid = task->cred->gid.val;
	process.live = signal->live.counter;
	process.status = signal->flags & SIGNAL_GROUP_EXIT ? signal->group_exit_code : task->exit_code;
	bpf_probe_read_kernel(process.comm, sizeof(process.comm), task->comm);
	bpf_seq_write(ctx->meta->seq, &process, sizeof(process));
	return 0;
}

/* In which pid namespace the agent is: no file under /proc tells its depth from inside. */
SEC("iter/task")
int kmonitor_where(struct bpf_iter__task *ctx)
{
	struct task_struct *reader;
	struct kmonitor_namespace here = {};
	struct upid upid = {};
	struct pid *pid;
	__u32 level;

	if (ctx->meta->seq_num || !ctx->task)
		return 0;
	reader = (struct task_struct *)bpf_get_current_task_btf();
	pid = reader->thread_pid;
	level = BPF_CORE_READ(pid, level);
	if (level > PID_NS_LEVEL_MAX)
		return 0;
	bpf_core_read(&upid, sizeof(upid), &pid->numbers[level]);
	here.level = level;
	here.inum = BPF_CORE_READ(upid.ns, ns.inum);
	bpf_seq_write(ctx->meta->seq, &here, sizeof(here));
	return 0;
}
