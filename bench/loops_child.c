// SPDX-License-Identifier: Apache-2.0
/* What the loop of posix_spawn executes: nothing. */
int main(void)
{
	return 0;
}
