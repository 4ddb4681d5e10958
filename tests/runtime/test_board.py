"""The state of boards, as their kernels and tools print it, and what makes their numbers unfair."""

from dataclasses import replace

import pytest

from gfcompile.runtime.devices.board import SCRIPT, Board, cautions, read_board
from gfcompile.runtime.devices.local import LocalDevice

CPU = "/sys/devices/system/cpu"


def lines(**sources: str) -> str:
    return "".join(f"{source}\t{line}\n" for source, text in sources.items()
                   for line in text.splitlines())  # fmt: skip


# L4T 32.6.1 with 2 CPUs of 6, in 7.5 W mode; formats as NVIDIA's developer guide shows them.
TX2 = lines(
    **{
        "uname -m": "aarch64",
        "uname -r": "4.9.253-tegra",
        "uname -n": "tx2",
        "/proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd evtstrm aes\nCPU part\t: 0xd07",
        "/proc/meminfo": "MemTotal:        8048372 kB\nMemAvailable:    6011220 kB",
        "/proc/loadavg": "0.08 0.12 0.09 1/312 8841",
        "/proc/device-tree/model": "quill\0",
        "/etc/nv_tegra_release": "# R32 (release), REVISION: 6.1, GCID: 27863751, BOARD: t186ref",
        "/usr/local/cuda/version.txt": "CUDA Version 10.2.300",
        "nvpmodel -q": "NV Fan Mode:quiet\nNV Power Mode: MAXQ\n1",
        f"{CPU}/cpu0/cpufreq/scaling_cur_freq": "345600",
        f"{CPU}/cpu0/cpufreq/cpuinfo_min_freq": "345600",
        f"{CPU}/cpu0/cpufreq/cpuinfo_max_freq": "2035200",
        f"{CPU}/cpu0/cpufreq/scaling_max_freq": "1190400",
        f"{CPU}/cpu0/cpufreq/scaling_governor": "schedutil",
        f"{CPU}/cpu0/cpufreq/scaling_driver": "tegra_cpufreq",
        f"{CPU}/cpu3/cpufreq/scaling_cur_freq": "345600",
        f"{CPU}/cpu3/cpufreq/cpuinfo_max_freq": "2035200",
        "/sys/class/thermal/thermal_zone0/type": "BCPU-therm",
        "/sys/class/thermal/thermal_zone0/temp": "41500",
        "/sys/class/thermal/thermal_zone5/type": "PMIC-Die",
        "/sys/class/thermal/thermal_zone5/temp": "100000",
        "/sys/class/devfreq/17000000.gp10b/cur_freq": "114750000",
        "/sys/class/devfreq/17000000.gp10b/max_freq": "1300500000",
        "ps": "12.5 Xorg",
    }
)
# A Raspberry Pi whose supply is too weak, and which was throttled before.
PI = lines(
    **{
        "uname -m": "aarch64",
        "/proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0",
        "/proc/cpuinfo": "processor\t: 0\nFeatures\t: fp asimd\nCPU part\t: 0xd08",
        "vcgencmd get_throttled": "throttled=0x40001",
        f"{CPU}/cpu0/cpufreq/scaling_governor": "powersave",
        f"{CPU}/cpu0/cpufreq/scaling_cur_freq": "600000",
        f"{CPU}/cpu0/cpufreq/scaling_driver": "cpufreq-dt",
    }
)


def texts(board: Board, after: Board | None = None) -> dict[str, str]:
    return {c.text: c.fix for c in cautions(board, after, [], stable=True, cv=0.0)}


def test_a_jetson_tells_its_mode_clocks_and_versions() -> None:
    board = read_board(TX2)
    assert (board.arch, board.name, board.cpu_model) == ("aarch64", "quill", "Cortex-A57")
    assert board.cpu_flags == {"fp", "asimd", "evtstrm", "aes"}
    assert board.versions == {"kernel": "4.9.253-tegra", "L4T": "32.6.1", "CUDA": "10.2.300"}
    state = board.state
    assert [core.index for core in state.cores] == [0, 3]
    core = state.cores[0]
    assert (core.mhz, core.max_mhz, core.limit_mhz) == (345.6, 2035.2, 1190.4)
    assert state.power_mode == "MAXQ"
    assert state.temperatures_c == {"BCPU-therm": 41.5}
    assert state.clocks_mhz == {"17000000.gp10b": 114.75, "17000000.gp10b max": 1300.5}
    assert state.memory_free_mb == pytest.approx(6155.5, abs=0.1)
    assert state.others == ("Xorg 12%",)


def test_a_jetson_in_a_small_power_mode_is_warned_of_with_the_command_that_mends_it() -> None:
    found = texts(read_board(TX2))
    assert found["the power mode is MAXQ, not MAXN"] == "sudo nvpmodel -m 0 && sudo jetson_clocks"
    assert found["clocks are not at their maximum: 17000000.gp10b"] == "sudo jetson_clocks"
    assert "CPU 0 is limited to 1190 of 2035 MHz" in found
    fair = TX2.replace("MAXQ", "MAXN").replace("\t114750000", "\t1300500000")
    assert texts(read_board(fair.replace("1190400", "2035200"))) == {}


def test_a_throttled_board_on_powersave_is_warned_of() -> None:
    board = read_board(PI)
    assert board.name == "Raspberry Pi 4 Model B Rev 1.4"
    assert board.state.throttling == ("under-voltage", "throttled since it was switched on")
    found = texts(board)
    assert "scaling_governor" in found["the CPU's governor is powersave"]
    assert any("under-voltage" in text and "power supply" in text for text in found)


def test_powersave_of_intel_is_its_usual_governor() -> None:
    assert (
        texts(read_board(PI.replace("cpufreq-dt", "intel_pstate").replace("0x40001", "0x0"))) == {}
    )


def test_throttling_during_the_run_counts() -> None:
    before = read_board(lines(**{f"{CPU}/cpu0/thermal_throttle/core_throttle_count": "3"}))
    after = read_board(lines(**{f"{CPU}/cpu0/thermal_throttle/core_throttle_count": "5"}))
    assert before.state.throttle_events == {"cpu0 core_throttle_count": 3}
    assert any("2 times during the run" in text for text in texts(before, after))
    assert texts(before, before) == {}


def test_other_work_on_the_board_is_told() -> None:
    busy = read_board(TX2.replace("0.08 0.12", "3.50 0.12"))
    assert texts(busy)["other processes kept the board busy: load 3.50 (Xorg 12%)"] == "top"


def test_times_that_grow_vary_or_never_settle_are_told() -> None:
    board = read_board("")
    slower = [100.0] * 50 + [110.0] * 50
    found = [c.text for c in cautions(board, None, slower, stable=False, cv=0.3)]
    assert any("took 10% longer than the first" in text for text in found)
    assert any("varied by 30%" in text for text in found)
    assert any("did not get stable" in text for text in found)
    steady = [100.0, 101.0] * 50
    assert cautions(board, None, steady, stable=True, cv=0.01) == []


def test_a_board_that_tells_nothing_is_read_nevertheless() -> None:
    for output in ("", "noise\nwithout tabs", "\t\n\t\t", "/proc/loadavg\tnonsense\nps\tx y"):
        assert texts(read_board(output)) == {}


def test_the_script_runs_on_this_machine() -> None:
    with LocalDevice() as device:
        board = read_board(device.script(SCRIPT))
    assert board.arch
    assert board.cpu_flags
    assert board.memory_mb is not None
    assert board.memory_mb > 100
    assert board.state.load_1min is not None
    assert replace(board.state, cores=()) != board.state
