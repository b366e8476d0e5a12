"""sass.py NVCC FLAGS...: what the compiler made of the kernels of train_gpu.cu, for GPUs from
Turing (2018) to Blackwell, without a GPU."""
import os, re, shutil, subprocess, sys, tempfile

#       registers are 65536 on each; shared memory, threads, blocks of a multiprocessor
GPUS = {75: (64, 1024, 16), 80: (164, 2048, 32), 86: (100, 1536, 16), 90: (228, 2048, 32),
        100: (228, 2048, 32), 120: (100, 1536, 24)}
LEGEND = """
For each GPU: registers of a thread; xN: CUDA blocks that fit on a multiprocessor; sN: bytes
spilled; and for the kernels that multiply, instructions for each FFMA, or HMMA of a tensor core.
These are counted in the innermost loops that multiply, on the way that loads whole Real4 and copies
the next step; of several loops the worst is shown. sm_89 is like sm_86."""
MULTIPLY, WIDE, NARROW = r'\b(FFMA|HMMA)\b', r'\b(STS|LDG\S*\.128)\b', r'\bLDG\b'

def run(*command):
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout

def blocks_that_fit(gpu, registers, shared, threads):
    kilobytes, most_threads, most_blocks = GPUS[gpu]
    warps = (threads + 31) // 32
    of_warp = -(-registers * 32 // 256) * 256          # registers come in units of 256 ...
    by_registers = 65536 // 4 // of_warp * 4 // warps  # ... from one of the four quarters
    shared += 1024 if gpu >= 80 else 0
    by_shared = kilobytes * 1024 // shared if shared else most_blocks
    return min(by_registers, by_shared, most_threads // threads, most_blocks)

def loops(code):
    """[(instructions, multiplies)] of the innermost loops that multiply"""
    place = {address: i for i, (address, _) in enumerate(code)}
    def target(text):
        m = re.search(r'\bBRA\b.*?(0x[0-9a-f]+)', text)
        return place.get(int(m[1], 16)) if m else None
    multiplies = [bool(re.search(MULTIPLY, t)) for _, t in code]
    jumps = {target(t): i for i, (_, t) in enumerate(code) if (target(t) or i + 1) <= i}
    spans = [s for s in jumps.items() if sum(multiplies[s[0]:s[1] + 1]) >= 16]   # begin, last jump
    found = []
    for begin, end in spans:
        if any(s != (begin, end) and begin <= s[0] and s[1] <= end for s in spans):
            continue
        best = {begin: (0, 0, 0)}                      # of the ways to an instruction, the one that
        for i in range(begin, end + 1):                # multiplies, loads wide and stores the most
            if i not in best:
                continue
            worth, n, hits = best[i]
            text, to, hit = code[i][1], target(code[i][1]), multiplies[i]
            worth += 1 - 2000*hit - 1000*bool(re.search(WIDE, text))
            worth += 1000 * (bool(re.search(NARROW, text)) and '.128' not in text)
            after = [end + 1] if i == end else []
            if to is not None and i < to <= end: after.append(to)
            if i < end and (to is None or text.startswith('@')): after.append(i + 1)
            for j in after:
                if j not in best or worth < best[j][0]:
                    best[j] = (worth, n + 1, hits + hit)
        if end + 1 in best and best[end + 1][2]:
            found.append(best[end + 1][1:])
    return found

def cells(gpu, nvcc, cuobjdump, threads, folder):
    cubin = f'{folder}/{gpu}.cubin'
    log = subprocess.run(nvcc + [f'-arch=sm_{gpu}', '-Xptxas', '-v', '-cubin', '-o', cubin,
                                 'train_gpu.cu'], check=True, capture_output=True, text=True).stderr
    table = {}
    for part in log.split("Compiling entry function '")[1:]:
        number = lambda what: int((re.search(r'(\d+) ' + what, part) or [0, 0])[1])
        table[part.split("'")[0]] = [number('registers'), number('bytes smem'),
                                     number('bytes spill stores'), '']
    for part in run(cuobjdump, '-sass', cubin).split('Function : ')[1:]:
        code = [(int(a, 16), t) for a, t in re.findall(r'/\*([0-9a-f]{4,5})\*/\s+(.*?) *;', part)]
        ratio = 0
        if re.search('matmul|attention', part.split()[0]):
            ratio = max((n / m for n, m in loops(code)), default=0)
        table[part.split()[0]][3] = f'{ratio:.2f}' if ratio else ''
    return {k: (shared, f'{registers:3} x{blocks_that_fit(gpu, registers, shared, threads[k]):<2}'
                + (f' {ratio}' if ratio else '') + (f' s{spilled}' if spilled else ''))
            for k, (registers, shared, spilled, ratio) in table.items()}

def main():
    nvcc = sys.argv[1:]
    beside = os.path.join(os.path.dirname(nvcc[0]), 'cuobjdump')
    cuobjdump = shutil.which('cuobjdump') or (beside if os.path.exists(beside) else None)
    if not cuobjdump:
        sys.exit('make sass needs cuobjdump and nvdisasm: they are in the CUDA toolkit, or in the '
                 'packages nvidia-cuda-cuobjdump and nvidia-cuda-nvdisasm of PyPI')
    with tempfile.TemporaryDirectory() as folder:
        run(*nvcc, '-arch=sm_80', '-ptx', '-o', f'{folder}/ptx', 'train_gpu.cu')
        bounds = re.findall(r'\.entry (\w+)\(.*?\)(.*?)\{', open(f'{folder}/ptx').read(), re.S)
        threads = {k: int((re.search(r'maxntid (\d+)', b) or [0, 256])[1]) for k, b in bounds}
        columns = {gpu: cells(gpu, nvcc, cuobjdump, threads, folder) for gpu in GPUS}
    print(f"{'kernel':30} {'threads':>7} {'shared':>6}", *(f'  sm_{gpu:<10}' for gpu in GPUS))
    for k in threads:
        length = re.match(r'_Z(?:L|N\d+)?(\d+)', k)
        name = k[length.end():][:int(length[1])]
        print(f'{name:30} {threads[k]:7} {columns[80][k][0]:6}',
              *(f'  {columns[gpu][k][1]:13}' for gpu in GPUS))
    print(LEGEND)

main()
