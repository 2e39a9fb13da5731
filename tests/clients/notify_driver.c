/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A monitor as one was written for the driver of 2004: it sleeps until a real-time signal comes, and reads from the siginfo_t
 * which event it was (si_int), and of which process (si_pid). Usage: notify_driver COUNT. Prints "ready", then a line for each
 * signal; ends after COUNT.
 */
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static int got_pipe[2];

struct note {
	int event, pid, code;
	unsigned int uid;
};

static void on_event(int signo, siginfo_t *info, void *context)
{
	struct note note = { info->si_int, info->si_pid, info->si_code, info->si_uid };

	(void)signo;
	(void)context;
	/* All that a handler may do: smaller than PIPE_BUF, so whole or not at all. */
	if (write(got_pipe[1], &note, sizeof(note)) != sizeof(note))
		_exit(3);
}

int main(int argc, char **argv)
{
	struct sigaction action = { .sa_sigaction = on_event, .sa_flags = SA_SIGINFO | SA_RESTART };
	int left = argc > 1 ? atoi(argv[1]) : 1;
	struct note note;

	setvbuf(stdout, NULL, _IOLBF, 0);
	if (pipe(got_pipe) || sigaction(SIGRTMIN, &action, NULL))
		return 2;
	printf("ready\n");
	while (left-- > 0) {
		if (read(got_pipe[0], &note, sizeof(note)) != sizeof(note))
			return 2;
		printf("event=0x%02x pid=%d uid=%u code=%d\n", note.event, note.pid, note.uid, note.code);
	}
	return 0;
}
