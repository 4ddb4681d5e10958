"""The state of a board: what one shell script reads there, and what makes its numbers unfair.

The script prints lines of a file or command behind the name of it, and asks nothing of the board
but a POSIX shell. What it cannot read is left out.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from gfcompile.runtime.results import BoardState, Caution, CoreState

_SYSTEM = "/sys/devices/system/cpu"

SCRIPT = r"""
read_files() {
    for file; do
        [ -r "$file" ] && [ -f "$file" ] || continue
        while IFS= read -r line || [ -n "$line" ]; do
            printf '%s\t%s\n' "$file" "$line"
        done <"$file" 2>/dev/null
    done
}
read_command() {
    command -v "$1" >/dev/null 2>&1 || return
    "$@" 2>/dev/null </dev/null | while IFS= read -r line; do printf '%s\t%s\n' "$*" "$line"; done
}
cpu=/sys/devices/system/cpu
read_command uname -m
read_command uname -r
read_command uname -n
read_files /proc/cpuinfo /proc/loadavg /proc/meminfo /proc/device-tree/model
read_files /sys/class/dmi/id/product_name /etc/nv_tegra_release /etc/os-release
read_files /usr/local/cuda/version.txt /usr/local/cuda/version.json /proc/driver/nvidia/version
for core in $cpu/cpu[0-9]*; do
    read_files $core/cpufreq/scaling_cur_freq $core/cpufreq/cpuinfo_min_freq \
        $core/cpufreq/cpuinfo_max_freq $core/cpufreq/scaling_max_freq \
        $core/cpufreq/scaling_governor $core/cpufreq/scaling_driver \
        $core/thermal_throttle/core_throttle_count $core/thermal_throttle/package_throttle_count
done
read_files /sys/class/thermal/thermal_zone*/type /sys/class/thermal/thermal_zone*/temp
read_files /sys/class/thermal/cooling_device*/type /sys/class/thermal/cooling_device*/cur_state
read_files /sys/class/devfreq/*/cur_freq /sys/class/devfreq/*/max_freq
read_files /sys/devices/platform/soc/soc:firmware/get_throttled
read_command vcgencmd get_throttled
read_command nvpmodel -q
read_command getprop ro.product.manufacturer
read_command getprop ro.product.model
read_command getprop ro.build.version.release
read_command settings get global low_power
# All but who asks.
ps -A -o pid= -o pcpu= -o comm= 2>/dev/null |
    while read -r pid share name; do
        [ "$pid" = "$PPID" ] || printf 'ps\t%s %s\n' "$share" "$name"
    done | sort -k 2 -rn | head -n 4
"""

# Bits of vcgencmd get_throttled on a Raspberry Pi; 16 higher: since it was switched on.
_PI_BITS = {
    0: "under-voltage",
    1: "ARM frequency capped",
    2: "throttled",
    3: "soft temperature limit",
}
_SET_GOVERNOR = "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
_MAXN = "sudo nvpmodel -m 0 && sudo jetson_clocks"
# Drivers whose "powersave" is their usual governor, and goes up to the highest frequency.
_OWN_GOVERNORS = ("intel_pstate", "amd-pstate-epp", "amd_pstate_epp")

_BUSY_LOAD = 0.5
_NOISY_CV = 0.10
_DRIFT = 1.05


@dataclass(frozen=True, kw_only=True)
class Board:
    """What a board is and how it is, as the script found it.

    Attributes:
        cpu_flags: of its first CPU, as /proc/cpuinfo spells them.
        drivers: of cpufreq, each once.
    """

    arch: str
    name: str
    cpu_model: str
    cpu_flags: frozenset[str] = frozenset()
    memory_mb: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    drivers: tuple[str, ...] = ()
    low_power: bool = False
    state: BoardState


def read_board(output: str) -> Board:
    """What the script printed."""
    found = _Found(output)
    return Board(
        arch=found.one("uname -m"),
        name=_name(found),
        cpu_model=_cpu_model(found),
        cpu_flags=frozenset(
            flag
            for key in ("flags", "Features")
            for flag in found.field("/proc/cpuinfo", key).split()
        ),
        memory_mb=_memory_mb(found, "MemTotal"),
        versions=_versions(found),
        drivers=tuple(dict.fromkeys(found.each(r"/cpufreq/scaling_driver$").values())),
        low_power=found.one("settings get global low_power") == "1",
        state=BoardState(
            cores=_cores(found),
            temperatures_c=_temperatures(found),
            throttling=_throttling(found),
            throttle_events=_throttle_events(found),
            power_mode=_power_mode(found),
            clocks_mhz=_clocks(found),
            load_1min=_number(found.one("/proc/loadavg").split(" ")[0]),
            memory_free_mb=_memory_mb(found, "MemAvailable"),
            others=_others(found),
        ),
    )


def cautions(
    before: Board, after: Board | None, samples_us: Sequence[float], *, stable: bool, cv: float
) -> list[Caution]:
    """What makes a latency unfair, each with the command that mends it."""
    found = [*_unfair_settings(before)]
    state = before.state
    if state.load_1min is not None and state.load_1min > _BUSY_LOAD:
        others = f" ({', '.join(state.others)})" if state.others else ""
        found.append(
            Caution(
                text=f"other processes kept the board busy: load {state.load_1min:.2f}{others}",
                fix="top",
            )
        )
    throttled = [*state.throttling]
    if after is not None:
        throttled += [reason for reason in after.state.throttling if reason not in throttled]
        if _events(after.state) > _events(state):
            throttled.append(f"{_events(after.state) - _events(state)} times during the run")
    if throttled:
        found.append(
            Caution(
                text=f"the board was throttled: {', '.join(throttled)}; "
                "cool it, and check its power supply",
                fix="sudo jetson_clocks --fan" if state.power_mode else "",
            )
        )
    slower = _drift(samples_us)
    if slower > _DRIFT:
        found.append(
            Caution(
                text=f"the last quarter of the runs took {slower - 1:.0%} longer than the first: "
                "it slows down as it gets warm"
            )
        )
    if cv > _NOISY_CV:
        found.append(Caution(text=f"times varied by {cv:.0%} (standard deviation over mean)"))
    if samples_us and not stable:
        found.append(Caution(text="times did not get stable before they were taken"))
    return found


def _unfair_settings(board: Board) -> Iterator[Caution]:
    governors = {core.governor for core in board.state.cores if core.governor}
    saving = governors & {"powersave", "conservative"}
    if saving and not set(board.drivers) & set(_OWN_GOVERNORS):
        yield Caution(text=f"the CPU's governor is {', '.join(sorted(saving))}", fix=_SET_GOVERNOR)
    capped = [c for c in board.state.cores if c.max_mhz and c.limit_mhz and c.limit_mhz < c.max_mhz]
    if capped:
        core = capped[0]
        yield Caution(
            text=f"CPU {core.index} is limited to {core.limit_mhz:.0f} of {core.max_mhz:.0f} MHz",
            fix=f"sudo cpupower frequency-set --max {core.max_mhz:.0f}MHz",
        )
    mode = board.state.power_mode
    if mode and not mode.upper().startswith("MAXN"):
        yield Caution(text=f"the power mode is {mode}, not MAXN", fix=_MAXN)
    slow = [name for name, mhz in _slow_clocks(board.state.clocks_mhz)]
    if mode and slow:
        yield Caution(
            text=f"clocks are not at their maximum: {', '.join(slow)}", fix="sudo jetson_clocks"
        )
    if board.low_power:
        yield Caution(text="battery saver is on", fix="adb shell settings put global low_power 0")


def _slow_clocks(clocks: Mapping[str, float]) -> Iterator[tuple[str, float]]:
    for name, mhz in clocks.items():
        most = clocks.get(f"{name} max")
        if most is not None and mhz < most:
            yield name, mhz


def _drift(samples_us: Sequence[float]) -> float:
    """Median of the last quarter over that of the first."""
    quarter = len(samples_us) // 4
    if quarter < 8:
        return 1.0
    first, last = sorted(samples_us[:quarter]), sorted(samples_us[-quarter:])
    return last[quarter // 2] / first[quarter // 2] if first[quarter // 2] > 0 else 1.0


def _events(state: BoardState) -> int:
    return sum(state.throttle_events.values())


class _Found:
    """The script's output: lines by file or command."""

    def __init__(self, output: str) -> None:
        self.lines: dict[str, list[str]] = {}
        for line in output.splitlines():
            source, tab, text = line.partition("\t")
            if tab:
                self.lines.setdefault(source, []).append(text.replace("\0", "").rstrip())

    def one(self, source: str) -> str:
        """The first line, or nothing."""
        return self.lines.get(source, [""])[0].strip()

    def each(self, pattern: str) -> dict[str, str]:
        """The first line of every source that the pattern is found in."""
        return {source: self.one(source) for source in self.lines if re.search(pattern, source)}

    def field(self, source: str, key: str) -> str:
        """The value of the first `key: value`, or nothing."""
        for line in self.lines.get(source, ()):
            name, colon, value = line.partition(":")
            if colon and name.strip() == key:
                return value.strip()
        return ""


def _name(found: _Found) -> str:
    android = " ".join(
        part
        for key in ("manufacturer", "model")
        if (part := found.one(f"getprop ro.product.{key}"))
    )
    model = found.one("/proc/device-tree/model") or found.one("/sys/class/dmi/id/product_name")
    return android or model or found.one("uname -n")


def _cpu_model(found: _Found) -> str:
    for key in ("model name", "Hardware", "Processor"):
        model = found.field("/proc/cpuinfo", key)
        if model:
            return model
    part = found.field("/proc/cpuinfo", "CPU part")
    return _ARM_PARTS.get(part, f"ARM part {part}") if part else ""


# Of implementer 0x41, as the technical reference manuals have them (MIDR_EL1).
_ARM_PARTS = {
    "0xd03": "Cortex-A53",
    "0xd04": "Cortex-A35",
    "0xd05": "Cortex-A55",
    "0xd07": "Cortex-A57",
    "0xd08": "Cortex-A72",
    "0xd09": "Cortex-A73",
    "0xd0a": "Cortex-A75",
    "0xd0b": "Cortex-A76",
    "0xd0d": "Cortex-A77",
    "0xd41": "Cortex-A78",
    "0xd42": "Cortex-A78AE",
    "0xd44": "Cortex-X1",
    "0xd46": "Cortex-A510",
    "0xd47": "Cortex-A710",
}


def _cores(found: _Found) -> tuple[CoreState, ...]:
    cores = {}
    for source in found.lines:
        match = re.match(rf"{_SYSTEM}/cpu(\d+)/cpufreq/", source)
        if match:
            index = int(match.group(1))
            folder = f"{_SYSTEM}/cpu{index}/cpufreq"
            cores[index] = CoreState(
                index=index,
                mhz=_mhz(found.one(f"{folder}/scaling_cur_freq")),
                min_mhz=_mhz(found.one(f"{folder}/cpuinfo_min_freq")),
                max_mhz=_mhz(found.one(f"{folder}/cpuinfo_max_freq")),
                limit_mhz=_mhz(found.one(f"{folder}/scaling_max_freq")),
                governor=found.one(f"{folder}/scaling_governor"),
            )
    if not cores:  # virtual machines have no cpufreq, x86 tells the clock nevertheless
        clocks = [
            _number(line.partition(":")[2])
            for line in found.lines.get("/proc/cpuinfo", ())
            if line.startswith("cpu MHz")
        ]
        return tuple(CoreState(index=i, mhz=mhz) for i, mhz in enumerate(clocks))
    return tuple(cores[index] for index in sorted(cores))


def _temperatures(found: _Found) -> dict[str, float]:
    temperatures = {}
    for source, text in found.each(r"/thermal_zone\d+/temp$").items():
        value = _number(text)
        folder = source.removesuffix("/temp")
        if value is not None and value > -100_000:  # Tegra's PMIC zone always says 100 C
            name = found.one(f"{folder}/type") or folder.rpartition("/")[2]
            temperatures[name] = value / 1000
    temperatures.pop("PMIC-Die", None)
    return temperatures


def _throttling(found: _Found) -> tuple[str, ...]:
    reasons = []
    text = found.one("vcgencmd get_throttled").partition("=")[2] or found.one(
        "/sys/devices/platform/soc/soc:firmware/get_throttled"
    )
    bits = _number(text, base=16)
    if bits is not None:
        reasons += [reason for bit, reason in _PI_BITS.items() if int(bits) >> bit & 1]
        reasons += [
            f"{reason} since it was switched on"
            for bit, reason in _PI_BITS.items()
            if int(bits) >> (bit + 16) & 1 and not int(bits) >> bit & 1
        ]
    for source, text in found.each(r"/cooling_device\d+/cur_state$").items():
        kind = found.one(source.replace("cur_state", "type"))
        state = _number(text)
        if state and re.search(r"cpufreq|cpu-|processor|gpu|throttle|balanced", kind, re.I):
            reasons.append(f"cooling by {kind}, step {state:.0f}")
    return tuple(reasons)


def _throttle_events(found: _Found) -> dict[str, int]:
    events = {}
    for source, text in found.each(r"/thermal_throttle/\w+_throttle_count$").items():
        value = _number(text)
        if value is not None:
            events[source.removeprefix(f"{_SYSTEM}/").replace("/thermal_throttle/", " ")] = int(
                value
            )
    return events


def _power_mode(found: _Found) -> str:
    """The name in nvpmodel's `NV Power Mode: MODE_15W`."""
    return found.field("nvpmodel -q", "NV Power Mode")


def _clocks(found: _Found) -> dict[str, float]:
    clocks = {}
    for source, text in found.each(r"/devfreq/[^/]+/(cur|max)_freq$").items():
        value = _number(text)
        *_, name, which = source.split("/")
        if value is not None:
            clocks[name if which == "cur_freq" else f"{name} max"] = value / 1e6
    return clocks


def _others(found: _Found) -> tuple[str, ...]:
    shares = []
    for line in found.lines.get("ps", ()):
        share, _, name = line.strip().partition(" ")
        value = _number(share)
        if value is not None and value >= 5 and name.strip() not in ("ps", "sh", "sort", "head"):
            shares.append(f"{name.strip()} {value:.0f}%")
    return tuple(shares)


def _versions(found: _Found) -> dict[str, str]:
    release = re.match(
        r"# R(\d+) \(release\), REVISION: ([\d.]+)", found.one("/etc/nv_tegra_release")
    )
    cuda = re.search(
        r"([\d.]+\d)",
        found.one("/usr/local/cuda/version.txt")
        or next(
            (
                line
                for line in found.lines.get("/usr/local/cuda/version.json", ())
                if "version" in line
            ),
            "",
        ),
    )
    system = next(
        (
            line.partition("=")[2].strip('"')
            for line in found.lines.get("/etc/os-release", ())
            if line.startswith("PRETTY_NAME=")
        ),
        "",
    )
    versions = {
        "system": system,
        "kernel": found.one("uname -r"),
        "L4T": f"{release.group(1)}.{release.group(2)}" if release else "",
        "CUDA": cuda.group(1) if cuda else "",
        "NVIDIA driver": found.one("/proc/driver/nvidia/version"),
        "Android": found.one("getprop ro.build.version.release"),
    }
    return {name: version for name, version in versions.items() if version}


def _memory_mb(found: _Found, key: str) -> float | None:
    kilobytes = _number(found.field("/proc/meminfo", key).removesuffix("kB"))
    return None if kilobytes is None else kilobytes * 1024 / 1e6


def _mhz(kilohertz: str) -> float | None:
    value = _number(kilohertz)
    return None if value is None else value / 1000


def _number(text: str, base: int = 10) -> float | None:
    try:
        return float(int(text, base)) if base != 10 else float(text)
    except ValueError:
        return None
