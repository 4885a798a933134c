// A model in GGUF, run by llama.cpp (node-llama-cpp) on a CPU: node llama_cpp.mjs MODEL.gguf THREADS CONTEXT
//
// Each line of input is a request in JSON, answered in one line, with the milliseconds that its threads took:
// {"read": [ids]}: a new text; {"steps": [ids]}: one token at a time, which are forgotten then;
// {"probabilities": id}: of what follows, after one more token.
import {createRequire} from "node:module";
import {createInterface} from "node:readline";

const [path, threads, context] = process.argv.slice(2);
const {getLlama} = await import(createRequire(process.cwd() + "/").resolve("node-llama-cpp"));
const llama = await getLlama({gpu: false, build: "never", maxThreads: +threads, logLevel: "error"});
const model = await llama.loadModel({modelPath: path});
const sequence = (await model.createContext({contextSize: +context, threads: +threads})).getSequence();

const requests = {
    async read(ids) {
        await sequence.clearHistory();
        await sequence.evaluateWithoutGeneratingNewTokens(ids);
    },
    async steps(ids) {
        const start = sequence.nextTokenIndex;
        for (const id of ids) await sequence.controlledEvaluate([[id, {generateNext: {token: true}}]]);
        await sequence.eraseContextTokenRanges([{start, end: sequence.nextTokenIndex}]);
    },
    async probabilities(id) {
        const [found] = await sequence.controlledEvaluate([[id, {generateNext: {probabilities: true}}]]);
        return [...found.next.probabilities];
    },
};

for await (const line of createInterface({input: process.stdin})) {
    const [[name, argument]] = Object.entries(JSON.parse(line));
    const before = process.cpuUsage();
    const found = await requests[name](argument);
    const {user, system} = process.cpuUsage(before);
    console.log(JSON.stringify({cpu: (user + system) / 1e3, found}));
}
process.exit(0);
