"""Hugging Face's library opens what ./train saves, ./train opens what the library saves or refuses
it, and ./test_gradients judges wrong homework. Run from the repository root. Needs torch,
transformers and numpy; where they are missing, this says so and checks nothing."""
import json, os, random, shutil, subprocess, sys, tempfile

try:
    import numpy as np
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, pipeline
    import transformers
except ImportError as missing:
    print(f"left out: {missing}")
    print("0 passed, 0 failed")
    sys.exit(0)

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()
work = tempfile.mkdtemp()
passed = failed = 0


def check(name, good, why=""):
    global passed, failed
    passed, failed = passed + bool(good), failed + (not good)
    print("ok" if good else "FAIL", name, "" if good else why)


def run(*command):
    r = subprocess.run([str(c) for c in command], capture_output=True)
    return r.returncode, r.stdout.decode(errors="replace") + r.stderr.decode(errors="replace")


def at(name):
    return os.path.join(work, name)


def loss_of(folder, text, *more):
    code, out = run("./train", text, "--eval", "--out", folder, *more)
    return float(out.split()[-1]) if code == 0 else out


def torch_loss(folder, text):
    model = AutoModelForCausalLM.from_pretrained(folder).double()
    T, byte = model.config.n_positions, list(open(text, "rb").read())
    sums = 0.0
    windows = (len(byte) - 1) // T
    for w in range(windows):
        x = torch.tensor([byte[w * T:w * T + T]])
        y = torch.tensor(byte[w * T + 1:w * T + T + 1])
        sums += torch.nn.functional.cross_entropy(model(x).logits[0], y).item()
    return sums / windows


# ---- What ./train saves
text, ours = at("text"), at("ours")
data = open("data/tales.txt", "rb").read()
open(text, "wb").write(data[:20000])
small = ["--n_layer", 2, "--n_head", 2, "--n_embd", 32, "--block_size", 32]
run("./train", "data/tales.txt", *small, "--max_steps", 200, "--learning_rate", 1e-2, "--out", ours,
    "--eval_interval", 0)
apart = abs(loss_of(ours, text) - torch_loss(ours, text))
check("the same loss in the library", apart < 1e-5, apart)

tokenizer = AutoTokenizer.from_pretrained(ours)
random.seed(1)
ranges = [(32, 127), (1, 0x800), (0x800, 0xd800), (0x10000, 0x11000)]
wrong = 0
for _ in range(3000):
    s = "".join(chr(random.randrange(*random.choice(ranges))) for _ in range(random.randrange(1, 40)))
    ids = tokenizer(s)["input_ids"]
    wrong += ids != list(s.encode()) or tokenizer.decode(ids) != s
check("3000 Unicode strings through the tokenizer: bytes, and back", wrong == 0, wrong)
check("256 tokens", len(tokenizer) == 256, len(tokenizer))
theirs = pipeline("text-generation", ours)("Once upon", max_new_tokens=20, do_sample=False)
mine = run("./generate", ours, "--prompt", "Once upon", "--greedy", "--tokens", 20)[1]
check("the pipeline writes what ./generate --greedy writes",
      mine.startswith(theirs[0]["generated_text"]), (theirs, mine))

# ---- What the library saves
model = GPT2LMHeadModel.from_pretrained(ours)
model.save_pretrained(at("sharded"), max_shard_size="50KB")
shards = [f for f in os.listdir(at("sharded")) if f.endswith(".safetensors")]
check(f"a model in {len(shards)} files", len(shards) > 1 and
      abs(loss_of(at("sharded"), text) - loss_of(ours, text)) < 1e-6, loss_of(at("sharded"), text))
for dtype in torch.float16, torch.bfloat16:
    GPT2LMHeadModel.from_pretrained(ours).to(dtype).save_pretrained(at(str(dtype)), max_shard_size="50KB")
    check(f"{dtype} comes back", abs(loss_of(at(str(dtype)), text) - loss_of(ours, text)) < 0.05,
          loss_of(at(str(dtype)), text))
shutil.copytree(ours, at("bin"))
os.rename(at("bin/model.safetensors"), at("bin/pytorch_model.bin"))
check("pytorch_model.bin is refused", "save_pretrained" in str(loss_of(at("bin"), text)))
GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, n_positions=16, vocab_size=1000, bos_token_id=None,
                           eos_token_id=None)).save_pretrained(at("words"))
check("a vocabulary that is not bytes is refused", "token is a byte" in str(loss_of(at("words"), text)))
check("but not if --vocab_size confirms it", loss_of(at("words"), text, "--vocab_size", 1000) > 0)
check("./generate --score refuses it, too",
      "token is a byte" in run("./generate", at("words"), "--score", "hello")[1])
for key, value in {"scale_attn_by_inverse_layer_idx": True, "reorder_and_upcast_attn": True,
                   "scale_attn_weights": False, "tie_word_embeddings": False, "model_type": "gptj",
                   "add_cross_attention": True, "activation_function": "gelu"}.items():
    other = at("other")
    shutil.rmtree(other, ignore_errors=True)
    shutil.copytree(ours, other)
    config = json.load(open(other + "/config.json"))
    config[key] = value
    json.dump(config, open(other + "/config.json", "w"))
    check(f"{key} {value} is refused by name", key in str(loss_of(other, text)), loss_of(other, text))
crop = at("crop")
run("./train", text, "--init", ours, "--block_size", 16, "--max_steps", 0, "--out", crop)
a, b = load_file(ours + "/model.safetensors"), load_file(crop + "/model.safetensors")
wpe = "transformer.wpe.weight"
check("--init with a shorter --block_size keeps the first positions", torch.equal(a[wpe][:16], b[wpe]))
check("with a longer one it is refused", "block_size 64" in run(
    "./train", text, "--init", ours, "--block_size", 64, "--out", crop)[1])


# ---- Homework
def against(tensors, *more):
    save_file({k: v.contiguous().clone() for k, v in tensors.items()}, at("theirs.safetensors"))
    return run("./test_gradients", "--against", at("theirs.safetensors"), *more)


for L, H, C, T, V, B in (2, 3, 12, 7, 29, 3), (3, 2, 16, 10, 50, 4):
    shape = ["--shape", f"{L},{H},{C},{T},{V},{B}"]
    run("./test_gradients", *shape, "--save", at("step.safetensors"))
    step = load_file(at("step.safetensors"))
    model = GPT2LMHeadModel(GPT2Config(n_layer=L, n_head=H, n_embd=C, n_positions=T, vocab_size=V,
                                       resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=None,
                                       eos_token_id=None)).double()
    model.transformer.load_state_dict(step, strict=False)
    logits = model(step["tokens"].long()).logits.reshape(-1, V)
    loss = torch.nn.functional.cross_entropy(logits, step["targets"].long().reshape(-1), reduction="none")
    loss.mean().backward()
    good = {"grad." + name: p.grad for name, p in model.transformer.named_parameters()}
    good.update(logits=logits.detach(), loss=loss.detach())
    code, out = against(good, *shape)
    check(f"PyTorch agrees at {shape[1]}", code == 0 and "0 failed" in out, out[-500:])

    def verdict(name, change, words):
        code, out = against({k: v for k, v in (change(k, v) for k, v in good.items())}, *shape)
        check(f"wrong homework at {shape[1]}: {name}", code == 1 and words in out, out[-800:])
    verdict("a weight of nn.Linear", lambda k, v: (k, v.t() if "c_fc.weight" in k else v), "transposed")
    verdict("a sum, not a mean", lambda k, v: (k, v * B * T if "grad" in k else v), "which is B T")
    head = step["grad.logits"].t() @ step["ln_f.out"]
    verdict("the head's part of wte", lambda k, v: (k, v - head if k == "grad.wte.weight" else v),
            "head's is missing")
    verdict("the embedding's part", lambda k, v: (k, head if k == "grad.wte.weight" else v),
            "embedding's is missing")
    rename = lambda k, v: (k.replace("grad.h.", "grad.blocks."), v)
    verdict("other names", rename, "grad.blocks.0.attn.c_attn.bias is none of the names")
    check("--partial lets them pass", against(dict(rename(k, v) for k, v in good.items()), *shape,
                                              "--partial")[0] == 0)

shutil.rmtree(work)
print(f"{passed} passed, {failed} failed")
sys.exit(failed > 0)
