"""fastjepa doctor: finds what limits a run and what keeps it from starting.

`examine` goes through it in order: probes gather facts, each in a process of its own, since a probe may crash or hang
(`probe_process`, `probe_installation`, `probe_run`); pure functions judge the facts (`judge_installation`, `judge_run`,
`limits`) and suggest settings (`suggest`); `diagnosis` holds the result and formats it. The only files written are --json
and the cache of image lists.
"""
