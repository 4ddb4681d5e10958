"""Autotuning: a search for better choices than the schedules' own rules make.

`database` is what compilations read; the rest is what `gfcompile tune` does: `tasks` are kernels
to be tuned, `proposals` say what to try next, `builders` build it in processes of their own,
`runners` say what it costs on a device, and `tuner` is the search.
"""
