/* SPDX-License-Identifier: GPL-2.0-only */
/*
 * The kernel's types, as far as the probe reads them. Offsets come from the running kernel (see loader.h): order and omissions
 * here mean nothing.
 */
#ifndef KMONITOR_KERNEL_H
#define KMONITOR_KERNEL_H

typedef _Bool bool;
#define true 1
#define false 0
#define NULL ((void *)0)

typedef struct {
	int counter;
} AS_IN_KERNEL atomic_t;

typedef struct {
	unsigned int val;
} AS_IN_KERNEL kuid_t;

typedef struct {
	unsigned int val;
} AS_IN_KERNEL kgid_t;

struct ns_common {
	unsigned int inum;
} AS_IN_KERNEL;

struct pid_namespace {
	struct ns_common ns;
} AS_IN_KERNEL;

struct upid {
	int nr;
	struct pid_namespace *ns;
} AS_IN_KERNEL;

struct pid {
	unsigned int level;
	struct upid numbers[];
} AS_IN_KERNEL;

struct cred {
	kuid_t uid;
	kgid_t gid;
} AS_IN_KERNEL;

struct kernfs_node {
	unsigned long long id; /* from 5.5 on a plain integer */
} AS_IN_KERNEL;

struct cgroup {
	struct kernfs_node *kn;
	int level; /* 0 is the root */
	struct cgroup *ancestors[]; /* by level, itself the last; from 6.1 on */
} AS_IN_KERNEL;

struct cgroup___before_6_1 {
	int level;
	unsigned long long ancestor_ids[];
} AS_IN_KERNEL;

struct css_set {
	struct cgroup *dfl_cgrp;
} AS_IN_KERNEL;

struct list_head {
	struct list_head *next;
	struct list_head *prev;
} AS_IN_KERNEL;

/* What depends on the signal and its code: who sent it, a fault's address, a timer's number, ... */
union __sifields {
	unsigned long long first;
} AS_IN_KERNEL;

struct kernel_siginfo {
	int si_signo;
	int si_code;
	union __sifields _sifields;
} AS_IN_KERNEL;

/* A signal that waits: struct sigpending has a list of them, and `list` comes first in both. */
struct sigqueue {
	struct list_head list;
	int flags;
	struct kernel_siginfo info;
} AS_IN_KERNEL;

struct sigpending {
	struct list_head list;
} AS_IN_KERNEL;

struct sigaction {
	void (*sa_handler)(int);
} AS_IN_KERNEL;

struct k_sigaction {
	struct sigaction sa;
} AS_IN_KERNEL;

struct hrtimer {
	long long _softexpires;
} AS_IN_KERNEL;

struct signal_struct {
	atomic_t live;
	int nr_threads; /* not yet released; `live` counts those that have not begun to end */
	int group_exit_code;
	unsigned int flags;
	struct sigpending shared_pending;
	struct hrtimer real_timer; /* of alarm(2) and setitimer(2) */
} AS_IN_KERNEL;

struct mm_struct {
	unsigned long arg_start;
	unsigned long arg_end;
} AS_IN_KERNEL;

struct task_struct {
	unsigned int flags;
	unsigned int ptrace; /* 0: no debugger */
	int exit_code;
	int pid;
	int tgid;
	struct task_struct *real_parent;
	struct task_struct *group_leader;
	struct pid *thread_pid;
	unsigned long long start_boottime; /* from 5.5 on; real_start_time before */
	const struct cred *cred;
	char comm[16];
	struct signal_struct *signal;
	struct sigpending pending;
	struct css_set *cgroups;
	struct mm_struct *mm;
	unsigned long long self_exec_id; /* another after each exec */
} AS_IN_KERNEL;

struct linux_binprm {
	const char *filename;
} AS_IN_KERNEL;

struct seq_file;

struct bpf_iter_meta {
	struct seq_file *seq;
	unsigned long long seq_num;
} AS_IN_KERNEL;

struct bpf_iter__task {
	struct bpf_iter_meta *meta;
	struct task_struct *task;
} AS_IN_KERNEL;

#endif
