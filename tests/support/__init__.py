"""What the tests stand on: a Hub with faults, real components, networks, guests with a kernel, models and archives.

`tests/` is on the path of the suite and of the benchmarks: `from support.hub import FaultHub`.
"""
