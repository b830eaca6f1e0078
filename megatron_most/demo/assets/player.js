// Plays the chunks of an answer one after another, without gaps, as they come. The value is {id, rate, plays, chunks};
// a chunk is base64 of 16-bit samples, and the list grows. gr.HTML gives element, props and watch.
let context = null, answer = null, given = 0, ends = 0, seconds = 0, sources = [];

const begin = (id) => {
  for (const source of sources) source.stop();
  [answer, given, ends, seconds, sources] = [id, 0, 0, 0, []];
};

const schedule = (samples, rate) => {
  if (!context || context.sampleRate !== rate) {
    if (context) context.close();
    context = new AudioContext({sampleRate: rate});  // the sound's own rate: chunks resampled one by one would click
    ends = 0;
  }
  context.resume();
  const buffer = context.createBuffer(1, samples.length, rate);
  buffer.copyToChannel(Float32Array.from(samples, (sample) => sample / 32768), 0);
  const source = context.createBufferSource();
  source.buffer = buffer;
  source.connect(context.destination);
  ends = Math.max(ends, context.currentTime + 0.1);
  source.start(ends);
  ends += buffer.duration;
  sources.push(source);
};

watch("value", () => {
  const {id, rate, plays, chunks} = props.value || {};
  if (!chunks) return;
  if (id !== answer) begin(id);
  for (; given < chunks.length; given++) {
    const bytes = Uint8Array.from(atob(chunks[given]), (letter) => letter.charCodeAt(0));
    const samples = new Int16Array(bytes.buffer);
    seconds += samples.length / rate;
    if (plays) schedule(samples, rate);
  }
  element.dataset.chunks = given;
  element.dataset.seconds = seconds.toFixed(3);
});
