# SPDX-License-Identifier: Apache-2.0
"""The peer in bcc: its ring with its stock callback, once an event. Run by the interpreter that has bcc, which is the system's.

    BCC_KERNEL_SOURCE=HEADERS python3 bcc_events.py

It decodes each event and counts it, and prints nothing: less than anything useful would do.
"""

import collections
import mmap

from bcc import BPF

_PROGRAM = """
struct event { u32 type; u32 pid; u32 tid; u64 time; char comm[16]; };
BPF_RINGBUF_OUTPUT(events, 4096);
static __always_inline int tell(u32 type)
{
    struct event event = {};
    u64 id = bpf_get_current_pid_tgid();
    event.type = type;
    event.pid = id >> 32;
    event.tid = id;
    event.time = bpf_ktime_get_ns();
    bpf_get_current_comm(&event.comm, sizeof(event.comm));
    events.ringbuf_output(&event, sizeof(event), 0);
    return 0;
}
RAW_TRACEPOINT_PROBE(sched_process_fork) { return tell(1); }
RAW_TRACEPOINT_PROBE(sched_process_exec) { return tell(2); }
RAW_TRACEPOINT_PROBE(sched_process_exit) { return tell(3); }
"""


def main() -> None:
    """Until it is ended by a signal."""
    bpf = BPF(text=_PROGRAM, cflags=[f"-DPAGE_SIZE={mmap.PAGESIZE}", "-w"])
    counts: collections.Counter[int] = collections.Counter()

    def on_event(_context: object, data: object, _size: int) -> None:
        counts[bpf["events"].event(data).type] += 1

    bpf["events"].open_ring_buffer(on_event)
    while True:
        bpf.ring_buffer_poll()


if __name__ == "__main__":
    main()
