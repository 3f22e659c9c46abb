// The logits of an exported folder's float32 file in Node, for texts given as JSON on the command line:
// node predict.mjs FOLDER FILE '["text", ...]'. Needs the npm packages onnxruntime-node and @huggingface/transformers.
import { AutoTokenizer, env } from "@huggingface/transformers";
import ort from "onnxruntime-node";
import path from "node:path";

const [folder, file, texts] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder);
const tokenizer = await AutoTokenizer.from_pretrained(path.basename(folder));
const session = await ort.InferenceSession.create(path.join(folder, "onnx", `${file}.onnx`), { logSeverityLevel: 3 });
const batch = await tokenizer(JSON.parse(texts), { padding: true, truncation: true });
const feed = {};
for (const name of session.inputNames) {
  if (name in batch) feed[name] = new ort.Tensor("int64", batch[name].data, batch[name].dims);
}
const answer = await session.run(feed);
const rows = answer.logits.dims[0];
const logits = Array.from(answer.logits.data);
console.log(JSON.stringify({
  logits: Array.from({ length: rows }, (_, row) => logits.slice((row * logits.length) / rows, ((row + 1) * logits.length) / rows)),
  exit_layer: answer.exit_layer ? Array.from(answer.exit_layer.data, Number) : null,
}));
