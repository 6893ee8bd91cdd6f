// Greedy answers of a published ONNX form, by Transformers.js: node ask.mjs FOLDER DTYPE PROMPTS.json TOKENS
import { readFileSync } from 'node:fs';
import { basename, dirname } from 'node:path';
import { env, pipeline } from '@huggingface/transformers';

const [folder, dtype, prompts, tokens] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = dirname(folder);
const generate = await pipeline('text-generation', basename(folder), dtype === 'default' ? {} : { dtype });
const found = [];
for (const messages of JSON.parse(readFileSync(prompts, 'utf8'))) {
  const [answer] = await generate(messages, { max_new_tokens: Number(tokens), do_sample: false });
  found.push(answer.generated_text.at(-1).content);
}
console.log(JSON.stringify(found));
