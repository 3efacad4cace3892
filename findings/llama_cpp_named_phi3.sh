#!/usr/bin/env bash
# llama.cpp cuts texts by the name of a model: `phi-3` or `phi3` in it, in whatever letters.
#
# Where `general.name` of a GGUF file holds one of the two, llama.cpp has special tokens take the white
# space behind them, all but <unk>, <s> and <|endoftext|> (src/llama-vocab.cpp), whatever the family.
# The same file under another name keeps it, and so gives a chat of Phi-3 other tokens than its
# tokenizer does, which strips there (`"rstrip": true`). And a model that is named so and lacks one of
# </s>, <unk>, <s>, <|endoftext|> is not loaded at all. No field of the file says either. Seen in
# llama.cpp of node-llama-cpp 3.21.1, with files that gguf 0.19.0 wrote.
#
# Exits with 0 while this is so, and with 1 when it is not any more. Needs npm with Node.js 20 or newer.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet gguf==0.19.0 numpy==2.4.2
npm install --silent --no-audit --no-fund --prefix "$folder" node-llama-cpp@3.21.1
"$folder/venv/bin/python" - "$folder" <<'PYTHON'
import sys

import gguf
import numpy as np

folder, width, inner = sys.argv[1], 32, 32
rng = np.random.default_rng(0)


def write(file: str, name: str, special: tuple[str, ...]) -> None:
    """Write a valid Llama of one block with tokens of SentencePiece's kind."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", *special]
    kinds = [2, 3, 3, *[6] * 256, 1, *[3] * len(special)]
    writer = gguf.GGUFWriter(f"{folder}/{file}.gguf", "llama")
    writer.add_name(name)
    writer.add_context_length(64)
    writer.add_embedding_length(width)
    writer.add_block_count(1)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(width // 2)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(k) for k in range(len(tokens))])
    writer.add_token_types(kinds)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    matrices = {"attn_q": width, "attn_k": width, "attn_v": width, "attn_output": width}
    matrices |= {"ffn_gate": inner, "ffn_up": inner, "ffn_down": width}
    shapes = {f"blk.0.{part}.weight": (rows, width) for part, rows in matrices.items()}
    shapes |= {"token_embd.weight": (len(tokens), width), "output.weight": (len(tokens), width)}
    shapes |= {f"{norm}.weight": (width,) for norm in ("output_norm", "blk.0.attn_norm")}
    shapes |= {"blk.0.ffn_norm.weight": (width,)}
    for key, shape in shapes.items():
        writer.add_tensor(key, rng.normal(size=shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


chat = ("<|user|>", "<|end|>")
write("other", "tiny", (*chat, "<|endoftext|>"))
write("named", "Tiny Phi-3", (*chat, "<|endoftext|>"))
write("other_without", "tiny", chat)
write("named_without", "Tiny Phi-3", chat)
PYTHON
cat > "$folder/ask.mjs" <<'NODE'
import {getLlama, LlamaLogLevel} from "node-llama-cpp";

const llama = await getLlama({
    gpu: false, build: "never", skipDownload: true, progressLogs: false,
    logLevel: LlamaLogLevel.disabled
});
console.log("llama.cpp", llama.llamaCppRelease.release);
const text = "<|user|>\n\n<|end|>";
const found = {};
for (const file of ["other", "named", "other_without", "named_without"]) {
    try {
        const model = await llama.loadModel({modelPath: `${file}.gguf`, gpuLayers: 0});
        found[file] = model.tokenize(text, true).length;
        console.log(`${file}: ${JSON.stringify(text)} is ${found[file]} tokens`);
    } catch (error) {
        found[file] = null;
        console.log(`${file}: ${String(error.message).split("\n")[0]}`);
    }
}
const {other, named, other_without, named_without} = found;
// the two special tokens alone where white space is taken; else a space and two line breaks, too
const isSo = named === 2 && other === 5 && other_without === 5 && named_without === null;
process.exit(isSo ? 0 : 1);
NODE
cd "$folder"
node ask.mjs
