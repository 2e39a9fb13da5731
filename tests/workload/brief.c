// SPDX-License-Identifier: Apache-2.0
// brief: for each line "MICROSECONDS CODE REAP" forks a child that ends with CODE after so long, and prints its pid. When it
// has ended prints "ended"; it is reaped then if REAP is 1, and otherwise is a zombie until the next line.
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

int main(void)
{
	int code, reap;
	char line[64];
	long micros;

	prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0); /* short sleeps, to the point */
	while (fgets(line, sizeof(line), stdin)) {
		siginfo_t info;
		pid_t child;

		if (sscanf(line, "%ld %d %d", &micros, &code, &reap) != 3)
			return 2;
		child = fork();
		if (child < 0)
			return 1;
		if (child == 0) {
			nanosleep(&(struct timespec){.tv_sec = micros / 1000000, .tv_nsec = micros % 1000000 * 1000}, NULL);
			_exit(code);
		}
		printf("%d\n", child);
		fflush(stdout);
		if (waitid(P_PID, (id_t)child, &info, WEXITED | (reap ? 0 : WNOWAIT)))
			return 1;
		printf("ended\n");
		fflush(stdout);
		if (!reap && fgets(line, sizeof(line), stdin) && waitid(P_PID, (id_t)child, &info, WEXITED))
			return 1;
	}
	return 0;
}
