// Every verb of the fine-tuning API by OpenAI's SDK: node fine_tune.mjs BASE_URL KEY FILE; prints one line of JSON
import fs from 'node:fs';
import OpenAI, { toFile } from 'openai';

const [baseURL, apiKey, path] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, adminAPIKey: apiKey, maxRetries: 0 });
const bytes = fs.readFileSync(path);
const told = {};

const refusal = async (call) => {
  try {
    await call;
    return 'no error';
  } catch (error) {
    return `${error.status} ${error.code} ${error.param}`;
  }
};

const file = await client.files.create({ file: fs.createReadStream(path), purpose: 'fine-tune' });
told.file = [file.status, (await client.files.retrieve(file.id)).filename];
told.content = Buffer.from(await (await client.files.content(file.id)).arrayBuffer()).equals(bytes);

const upload = await client.uploads.create({ bytes: bytes.length, filename: 'parts.jsonl', mime_type: 'text/jsonl', purpose: 'fine-tune' });
const parts = [];
for (const half of [bytes.subarray(0, 100), bytes.subarray(100)]) {
  parts.push((await client.uploads.parts.create(upload.id, { data: await toFile(half, 'part') })).id);
}
const done = await client.uploads.complete(upload.id, { part_ids: parts });
told.upload = [done.status, done.file.status];
const other = await client.uploads.create({ bytes: 1, filename: 'x', mime_type: 'text/jsonl', purpose: 'fine-tune' });
told.cancelled = (await client.uploads.cancel(other.id)).status;
told.files = 0;
for await (const _ of client.files.list({ limit: 1 })) told.files += 1;

const jobs = client.fineTuning.jobs;
const job = await jobs.create({ model: 'gpt-plain', training_file: file.id, suffix: 'node', seed: 3, metadata: { by: 'node' } });
told.job = [job.status, job.seed, job.metadata.by, (await jobs.retrieve(job.id)).id === job.id];
told.paused = (await jobs.pause(job.id)).status;
told.resumed = (await jobs.resume(job.id)).status;
told.events = [];
for await (const event of jobs.listEvents(job.id, { limit: 1 })) told.events.push(event.message);
told.checkpoints = (await jobs.checkpoints.list(job.id)).data.length;
told.listed = [];
for await (const found of jobs.list({ limit: 1 })) if (found.id === job.id) told.listed.push(found.id);
told.end = (await jobs.cancel(job.id)).status;
told.unknown = await refusal(jobs.create({ model: 'gpt-plain', training_file: file.id, colour: 'red' }));
told.missing = await refusal(jobs.retrieve('ftjob-none'));
told.permissions = await refusal(client.fineTuning.checkpoints.permissions.list('ft:x'));
told.models = (await client.models.list()).data.filter((model) => model.id.startsWith('ft:')).length;
told.model = await refusal(client.models.delete('ft:a:b:c:d'));
told.deleted = (await client.files.delete(done.file.id)).deleted;
console.log(JSON.stringify(told));
