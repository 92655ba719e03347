"""Does memory grow? Thousands of steps, loads or jobs, with the memory of host and GPU written down in between.

    python tools/soak.py steps --count 10000     decoding steps, round after round by one decoder
    python tools/soak.py loads --count 1000      load a model, write a few tokens, drop it
    python tools/soak.py serve --count 2000      jobs of a Generator that come and go, whose pages are used again
    python tools/soak.py figure memory.jsonl     a drawing of runs that were kept, docs/figures/memory.svg

Runs on the GPU where there is one, else with NumPy. --out FILE adds a run's samples to a file, a line of JSON each. Prints a
table, and exits with 1 where memory has grown: after a tenth of the run, which warms up, both the slope of the line of least
squares, over what was left of the run, and the difference of the last and the first sample must stay below --limit MiB, for
every kind of memory. Before each sample Python's garbage is collected, as what waits for that is not lost.
"""

import argparse
import ctypes
import functools
import gc
import json
import os
import platform
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import cupyq  # noqa: E402
from cupyq import _device  # noqa: E402
from cupyq.generate import SamplerSettings  # noqa: E402
from cupyq.serve import Generator, Job  # noqa: E402

MODEL = ROOT / "examples/models/shakespeare-exl2-4.0"
PROMPT = [10, 200, 30, 400, 50, 60, 70, 80]
WARM_UP = 0.1  # of a run
KINDS = {"host": "host, resident", "device": "GPU, in use", "pool": "GPU, CuPy's pool"}


# --- what is run: each yields how much is done by now ---------------------------------------------------------------


def steps(model_path, backend, count, every):
    """Text after text by one decoder; a graph on a GPU. Each ends within the warm-up, as a cache fills for the first time."""
    model = cupyq.load_model(model_path, backend)
    decoder = model.decoder(max_len=len(PROMPT) + max(8, min(248, count // 20)), settings=SamplerSettings(), seed=0)
    done = 0
    while done < count:
        if not done or decoder.length > decoder.capacity:
            decoder.start([PROMPT])
        batch = min(every - done % every, count - done, decoder.capacity - decoder.length + 1)
        tokens = np.array([int(token[0]) for token in decoder.stream(batch + 1)])  # and the one drawn before
        if (tokens < 0).any():
            raise RuntimeError(f"the model gave no finite logits within steps {done} to {done + batch}")
        done += batch
        yield done


def loads(model_path, backend, count, every):
    """A model at a time, each with a decoder, a cache of codes and a prompt without a cache."""
    for done in range(1, count + 1):
        model = cupyq.load_model(model_path, backend)
        decoder = model.decoder(max_len=32, seed=0)
        decoder.start([PROMPT])
        decoder.run(4)
        cache = model.new_cache(capacity=32, kind="q8")
        model.forward([PROMPT], cache, last_only=True)
        del model, decoder, cache
        yield done


def serve(model_path, backend, count, every):
    """Up to 8 jobs at a time over 32 pages, others wait: lengths differ, some prompts share beginnings, some are cancelled.

    How many there are goes up and down, so that batches of all sizes, and their graphs, have been there early on.
    """
    model = cupyq.load_model(model_path, backend)
    generator = Generator(model, cache_tokens=32 * 32, page_size=32, max_batch=8, chunk=64)
    rng = np.random.default_rng(0)
    vocab = model.config.vocab_size
    shared = rng.integers(2, vocab, 96).tolist()
    added = done = told = 0
    running = []
    while done < count:
        while len(running) < 1 + added // 4 % 12 and added < count:
            begin = shared[: int(rng.integers(97))]
            prompt = [*begin, *rng.integers(2, vocab, int(rng.integers(1, 40))).tolist()]
            settings = SamplerSettings() if added % 3 else SamplerSettings.greedy()
            new = int(rng.integers(1, 16))
            running.append(generator.add(Job(prompt, max_new_tokens=new, stop_tokens=[], settings=settings, seed=added)))
            added += 1
            if added % 17 == 0:
                running[int(rng.integers(len(running)))].cancel()
        generator.step()
        for job in running:
            if job.error is not None:
                raise job.error
        ended = [job for job in running if job.is_done]
        running = [job for job in running if not job.is_done]
        done += len(ended)
        if done > told:
            told = done
            yield done
    if generator.free_pages != generator.pages:
        raise RuntimeError(f"{generator.pages - generator.free_pages} of {generator.pages} pages were not given back")


MODES = {"steps": steps, "loads": loads, "serve": serve}
COUNTS = {"steps": 10_000, "loads": 1_000, "serve": 2_000}


# --- memory ---------------------------------------------------------------------------------------------------------


def host_bytes():
    """What of this process is in memory now, in bytes."""
    resident = int(Path("/proc/self/statm").read_text().split()[1])
    return resident * os.sysconf("SC_PAGE_SIZE")


def memory(on_gpu):
    """{kind of KINDS: bytes}, after everything that nobody holds has been given up."""
    gc.collect()
    found = {}
    if on_gpu:
        import cupy

        cupy.cuda.runtime.deviceSynchronize()
        found = {"device": device_bytes(cupy.cuda), "pool": cupy.get_default_memory_pool().total_bytes()}
    _give_back_to_the_system()
    return {"host": host_bytes(), **found}


class _OfProcess(ctypes.Structure):
    """nvmlProcessInfo_v2_t."""

    _fields_ = [("pid", ctypes.c_uint), ("used", ctypes.c_ulonglong), ("instance", ctypes.c_uint), ("compute", ctypes.c_uint)]


@functools.cache
def _nvml_query(place):
    """(NVML's query of the processes of a GPU, its handle of the GPU at a place of the PCI bus); None where it has none."""
    device = ctypes.c_void_p()
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        failed = nvml.nvmlInit_v2() or nvml.nvmlDeviceGetHandleByPciBusId_v2(place.encode(), ctypes.byref(device))
        return None if failed else (nvml.nvmlDeviceGetComputeRunningProcesses_v3, device)
    except (OSError, AttributeError):  # no driver, or an older one
        return None


def device_bytes(cuda):
    """Memory of the current GPU that this process has, its context included.

    NVML tells it by process; where it does not know this one, as in some containers, it is what all have together, among whom
    there should be no other then. Source: NVML API reference, Device Queries.
    """
    if (found := _nvml_query(cuda.Device().pci_bus_id)) is not None:
        query, device = found
        count = ctypes.c_uint(256)
        processes = (_OfProcess * count.value)()
        failed = query(device, ctypes.byref(count), processes)
        mine = [p.used for p in processes[: count.value] if p.pid == os.getpid() and p.used < 1 << 60]
        if mine and not failed:
            return mine[0]
    free, total = cuda.runtime.memGetInfo()
    return total - free


def _give_back_to_the_system():
    """glibc keeps what is freed, and how much of it depends on luck: malloc_trim(3) leaves what is in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def soak(mode, model_path=MODEL, backend="auto", count=None, every=None, minutes=None):
    """Run, until `count` are done or the minutes are over -> (what was run, samples): dicts of JSON."""
    count = COUNTS[mode] if count is None else count
    every = max(count // 200, 1) if every is None else every
    backend = _device.choose_backend(backend)
    on_gpu = backend == "cupy"
    about = {
        "soak": mode,
        "count": count,
        "model": Path(model_path).name,
        "backend": backend,
        "gpu": _device.current().name if on_gpu else None,
        "cupyq": cupyq.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }
    samples, start, due = [], time.perf_counter(), every
    for done in MODES[mode](model_path, backend, count, every):
        seconds = round(time.perf_counter() - start, 3)
        is_over = done >= count or minutes is not None and seconds > 60 * minutes
        if done >= due or is_over:
            samples.append({"done": done, "seconds": seconds, **memory(on_gpu)})
            due = done + every
        if is_over:
            break
    return about | {"count": samples[-1]["done"]}, samples


def growth(samples, kind):
    """(slope x what was left of the run, last - first), in bytes, of the samples after the warm-up."""
    last = samples[-1]["done"]
    kept = [sample for sample in samples if sample["done"] > WARM_UP * last]
    if len(kept) < 5:
        raise ValueError(f"{len(kept)} samples after the warm-up are too few to see growth: ask for a larger --count")
    done = np.array([sample["done"] for sample in kept], np.float64)
    values = np.array([sample[kind] for sample in kept], np.float64)
    slope = np.polyfit(done - done.mean(), values - values.mean(), 1)[0]
    return slope * (done[-1] - done[0]), values[-1] - values[0]


def verdict(samples, limit_mib):
    """{kind: (by the slope, by the difference, whether it has grown)}, the first two in MiB."""
    found = {}
    for kind in (kind for kind in KINDS if kind in samples[0]):
        mib = [value / 2**20 for value in growth(samples, kind)]
        found[kind] = (*mib, max(mib) > limit_mib)
    return found


# --- what is said and kept --------------------------------------------------------------------------------------------


def table(about, samples, found, limit_mib):
    """Lines: about a dozen of the samples, and what became of each kind of memory."""
    where = about["gpu"] or "NumPy"
    yield f"{about['soak']}: {about['count']} on {where}, {about['model']}, {samples[-1]['seconds']:.0f} s"
    kinds = list(found)
    yield f"{'done':>8}{'seconds':>10}" + "".join(f"{KINDS[kind]:>20}" for kind in kinds)
    shown = sorted({round(i * (len(samples) - 1) / 11) for i in range(12)})
    for sample in (samples[i] for i in shown):
        numbers = "".join(f"{sample[kind] / 2**20:>16.2f} MiB" for kind in kinds)
        yield f"{sample['done']:>8}{sample['seconds']:>10.1f}{numbers}"
    for kind, (slope, difference, has_grown) in found.items():
        word = "GREW" if has_grown else "did not grow"
        yield (
            f"{KINDS[kind]}: {word}; after the warm-up {slope:+.2f} MiB by its slope, {difference:+.2f} from the first sample "
            f"to the last, allowed {limit_mib:g}"
        )


def keep(path, about, samples):
    with open(path, "a", encoding="utf-8") as file:
        for line in (about, *samples):
            print(json.dumps(line), file=file)


def read_runs(paths):
    """[(about, samples)] of files that `keep` wrote."""
    runs = []
    for path in paths:
        for line in Path(path).read_text(encoding="utf-8").splitlines():
            record = json.loads(line)
            if "soak" in record:
                runs.append((record, []))
            else:
                runs[-1][1].append(record)
    return runs


def figure(runs):
    """Curves of the memory of every run, a row each: how far it is from the first sample after the warm-up, in MiB."""
    import draw_figures as draw

    left, top, width, height, gap = 76, 96, 600, 110, 64
    colors = {"host": draw.BLUE, "device": draw.ORANGE, "pool": draw.GREEN}
    places = dict.fromkeys(about["gpu"] or "NumPy" for about, _ in runs)
    note = f"Memory less that of the first sample after the warm-up (gray), in MiB. {', '.join(places)}."
    parts = draw.heading("Memory over thousands of steps, loads and jobs", note)
    for row, (about, samples) in enumerate(runs):
        y0 = top + row * (height + gap)
        kinds = [kind for kind in KINDS if kind in samples[0]]
        end = samples[-1]["done"]
        first = next(sample for sample in samples if sample["done"] > WARM_UP * end)
        curves = {kind: [(s["done"], (s[kind] - first[kind]) / 2**20) for s in samples] for kind in kinds}
        reach = 8.0
        while reach < max(abs(mib) for curve in curves.values() for done, mib in curve if done >= first["done"]):
            reach *= 2

        def at(done, mib, y0=y0, end=end, reach=reach):
            return left + width * done / end, y0 + height / 2 - height / 2 * min(max(mib / reach, -1), 1)

        parts.append(draw.box(left, y0, width * WARM_UP, height, draw.LIGHT, line="none"))
        for mib in (-reach, 0, reach):
            _, y = at(0, mib)
            parts += [draw.stroke([(left, y), (left + width, y)], "#E4E4E4")]
            parts += [draw.text(left - 8, round(y + 4, 1), f"{mib:+g}" if mib else "0", anchor="end", size=11)]
        for share in (0, 0.25, 0.5, 0.75, 1):
            x, _ = at(share * end, 0)
            parts += [draw.text(round(x, 1), y0 + height + 18, f"{share * end:,.0f}", anchor="middle", size=11)]
        unit = {"steps": "decoding steps", "loads": "models loaded and dropped", "serve": "jobs served"}[about["soak"]]
        parts.append(draw.text(left, y0 - 10, f"{unit}, {about['model']}", weight="bold"))
        for i, kind in enumerate(kinds):
            parts.append(draw.stroke([at(*point) for point in curves[kind]], colors[kind], 1.6, 'stroke-linejoin="round"'))
            x, y = left + width + 14, y0 + 14 + 36 * i
            parts += [draw.stroke([(x, y - 4), (x + 18, y - 4)], colors[kind], 2), draw.text(x + 24, y, KINDS[kind], size=11)]
            parts += [draw.text(x + 24, y + 14, f"{first[kind] / 2**20:,.0f} MiB", size=11, color=draw.GRAY)]
    return draw.svg(left + width + 170, top + len(runs) * (height + gap) - 10, "Memory over thousands of steps", parts)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("mode", choices=(*MODES, "figure"))
    parser.add_argument("files", nargs="*", help="of figure: what --out wrote")
    parser.add_argument("--count", type=int, help=f"default: {', '.join(f'{k} {n}' for k, n in COUNTS.items())}")
    parser.add_argument("--minutes", type=float, help="after which a run ends with what is done by then")
    parser.add_argument("--every", type=int, help="a sample each time so many are done (default: 200 samples)")
    parser.add_argument("--model", default=MODEL, type=Path)
    parser.add_argument("--backend", default="auto", choices=("auto", "numpy", "cupy"))
    parser.add_argument("--limit", default=4.0, type=float, metavar="MIB", help="growth that counts as none (default: 4)")
    parser.add_argument("--out", type=Path, help="file that the samples are added to; of figure: the drawing")
    options = parser.parse_args(arguments)
    if options.mode == "figure":
        out = ROOT / "docs/figures/memory.svg" if options.out is None else options.out
        out.write_text(figure(read_runs(options.files)), encoding="utf-8")
        print(out)
        return 0
    about, samples = soak(options.mode, options.model, options.backend, options.count, options.every, options.minutes)
    if options.out is not None:
        keep(options.out, about, samples)
    found = verdict(samples, options.limit)
    print(*table(about, samples, found, options.limit), sep="\n")
    return int(any(has_grown for *_, has_grown in found.values()))


if __name__ == "__main__":
    sys.exit(main())
