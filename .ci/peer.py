"""peer.py NAME STEPS L H C T B V: the same training step in PyTorch, for `make bench PEER=python3`."""
import statistics, sys, time
import torch
from transformers import GPT2Config, GPT2LMHeadModel

steps, L, H, C, T, B, V = map(int, sys.argv[2:])
model = GPT2LMHeadModel(GPT2Config(n_layer=L, n_head=H, n_embd=C, n_positions=T, vocab_size=V, resid_pdrop=0,
                                   embd_pdrop=0, attn_pdrop=0, bos_token_id=None, eos_token_id=None))
model.loss_type = "ForCausalLM"
model.config.use_cache = False
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.99), weight_decay=0.1)
took = []
for step in range(max(steps, 10)):
    start = time.perf_counter()
    x = torch.randint(min(V, 256), (B, T))
    model(x, labels=x).loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    took.append(time.perf_counter() - start)
ms = 1000 * statistics.median(took)
print(f"    PyTorch {torch.__version__:30} |  {ms:.2f} ms/step | {B * T / ms * 1000:.0f} tokens/s"
      f" | threads {torch.get_num_threads()}")
