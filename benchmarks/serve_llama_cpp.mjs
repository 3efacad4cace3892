// Greedy streams by llama.cpp, through node-llama-cpp; started by serve_llama_cpp.py.
//
// stdin: one JSON object
//   package   file URL of node-llama-cpp's main module
//   model     path of the GGUF file
//   prompts   lists of token ids; each has a sequence of its own in one context
//   n_new     tokens of a stream
//   threads
// stdout: one JSON object, {alone, together}: of each prompt {tokens, first_token_s, last_token_s}, one
//   after another and all at once, in seconds since its start and since the start of all
import {readFileSync} from "node:fs";

const request = JSON.parse(readFileSync(0, "utf8"));
const {getLlama, LlamaLogLevel} = await import(request.package);
const llama = await getLlama({
    gpu: false, build: "never", skipDownload: true, progressLogs: false,
    logLevel: LlamaLogLevel.error, maxThreads: request.threads
});
const model = await llama.loadModel({
    modelPath: request.model, gpuLayers: 0, ignoreMemorySafetyChecks: true
});
const context = await model.createContext({
    sequences: request.prompts.length,
    contextSize: Math.max(...request.prompts.map((prompt) => prompt.length)) + request.n_new + 8,
    threads: request.threads,
    ignoreMemorySafetyChecks: true
});
const sequences = request.prompts.map(() => context.getSequence());

async function stream(number, start = performance.now()) {
    const sequence = sequences[number];
    await sequence.clearHistory();
    const options = {temperature: 0, yieldEogToken: true};
    const seconds = () => (performance.now() - start) / 1000;
    let tokens = 0, first = 0;
    for await (const _ of sequence.evaluate(request.prompts[number], options)) {
        first ||= seconds();
        if (++tokens === request.n_new) break;
    }
    return {tokens, first_token_s: first, last_token_s: seconds()};
}

async function alone() {
    const done = [];
    for (const number of request.prompts.keys()) done.push(await stream(number));
    return done;
}

function together() {
    const start = performance.now();
    return Promise.all([...request.prompts.keys()].map((number) => stream(number, start)));
}

await stream(0);
const answer = {alone: await alone(), together: await together()};
process.stdout.write(JSON.stringify(answer), () => process.exit(0));
