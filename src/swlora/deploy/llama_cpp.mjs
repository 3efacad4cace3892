// What llama.cpp computes from a GGUF file, through node-llama-cpp; started by llama_cpp.py.
//
// stdin: one JSON object
//   package        file URL of node-llama-cpp's main module
//   model          path of the GGUF file
//   lora           path of a LoRA as GGUF, or null
//   texts          texts to turn into token ids; special tokens in them count as such
//   sequences      lists of token ids; the log-probabilities behind every token are written
//   prompts        lists of token ids that are continued greedily
//   n_new          tokens of a continuation
//   context_tokens, threads
//   output         file for the log-probabilities: float32, native order, a row for each token
// stdout: one JSON object, {release, n_vocab, bos, eos, add_bos, tokens, continuations},
//   or {error} where it failed, with exit code 1
import {closeSync, openSync, readFileSync, writeSync} from "node:fs";

const TOKENS_AT_ONCE = 16; // a distribution over a large vocabulary takes megabytes
const greedy = {temperature: 0};

async function writeLogProbabilities(sequence, nVocab, request) {
    const file = openSync(request.output, "w");
    const asked = {generateNext: {probabilities: true, options: greedy}};
    for (const tokens of request.sequences) {
        await sequence.clearHistory();
        for (let at = 0; at < tokens.length; at += TOKENS_AT_ONCE) {
            const part = tokens.slice(at, at + TOKENS_AT_ONCE);
            for (const {next} of await sequence.controlledEvaluate(part.map((t) => [t, asked]))) {
                const row = new Float32Array(nVocab).fill(-Infinity);
                for (const [token, probability] of next.probabilities)
                    row[token] = Math.log(probability);
                writeSync(file, new Uint8Array(row.buffer));
            }
        }
    }
    closeSync(file);
}

async function continuation(sequence, prompt, nNew) {
    const asked = {generateNext: {token: true, options: greedy}};
    const tokens = [];
    await sequence.clearHistory();
    let input = prompt;
    while (tokens.length < nNew) {
        const outputs = await sequence.controlledEvaluate(
            [...input.slice(0, -1), [input.at(-1), asked]]
        );
        tokens.push(outputs.at(-1).next.token);
        input = tokens.slice(-1);
    }
    return tokens;
}

async function answerTo(request, said) {
    const {getLlama, LlamaLogLevel} = await import(request.package);
    const llama = await getLlama({
        gpu: false,
        build: "never",
        skipDownload: true,
        progressLogs: false,
        logLevel: LlamaLogLevel.warn,
        logger: (level, message) => level === LlamaLogLevel.warn || said.push(message.trim())
    });
    const model = await llama.loadModel({
        modelPath: request.model, gpuLayers: 0, ignoreMemorySafetyChecks: true
    });
    const answer = {
        release: llama.llamaCppRelease.release,
        n_vocab: [...model.iterateAllTokens()].length,
        bos: model.tokens.bos,
        eos: model.tokens.eos,
        add_bos: model.tokens.shouldPrependBosToken,
        tokens: request.texts.map((text) => model.tokenize(text, true)),
        continuations: []
    };
    if (request.sequences.length + request.prompts.length > 0) {
        const context = await model.createContext({
            contextSize: request.context_tokens,
            threads: request.threads,
            ignoreMemorySafetyChecks: true,
            // exact, so that what differs is the file's
            flashAttention: false,
            experimentalKvCacheKeyType: "F32",
            experimentalKvCacheValueType: "F32",
            lora: request.lora ?? undefined
        });
        const sequence = context.getSequence();
        await writeLogProbabilities(sequence, answer.n_vocab, request);
        for (const prompt of request.prompts)
            answer.continuations.push(await continuation(sequence, prompt, request.n_new));
    }
    return answer;
}

const parent = process.ppid; // nobody is left to hear the answer once it has ended
setInterval(() => process.ppid === parent || process.exit(1), 1000).unref();

const said = [];
let answer;
try {
    answer = await answerTo(JSON.parse(readFileSync(0, "utf8")), said);
} catch (error) {
    answer = {error: [String(error?.message ?? error), ...said.slice(-3)].join("; ")};
}
process.stdout.write(JSON.stringify(answer), () => process.exit(answer.error == null ? 0 : 1));
