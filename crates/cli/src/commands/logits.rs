//! `anabranch logits`: the numbers behind the text, to compare another implementation with.

use crate::{
    device::{Place, Task, Where},
    failure::Failure,
    interrupt,
    memory::{self, Demand},
    source::Source,
    units,
};
use anabranch_model::{
    Backend, Batch, Config, Error, Model, Observer, Segment, TensorFile, TopkIds, blocks_for,
    checkpoint::{TensorLayout, TensorWriter, write_tensor_file},
};
use safetensors::Dtype;
use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

/// Write a model's logits, and on request its hidden states and expert choices, to a safetensors file
#[derive(clap::Args)]
#[command(after_help = "Example:\n  \
    anabranch logits --model DIR --input-ids ids.safetensors --out out.safetensors --hidden\n\n\
    Reads  input_ids  int64    [B, T]     B sequences of T tokens, each from position 0\n\
    Writes logits     float32  [B, T, V]\n       \
           hidden.N   float32  [B, T, d]  with --hidden: 0 is the embedding, N the residual stream after N blocks,\n                                     \
                                          the last one after the final norm\n       \
           topk.N     int64    [B*T, K]   with --hidden: experts that layer N chose, ascending (MoE layers only)\n\n\
    The file appears whole or not at all.")]
pub(crate) struct Arguments {
    #[command(flatten)]
    source: Source,
    /// Safetensors file with `input_ids`
    #[arg(long, value_name = "FILE")]
    input_ids: PathBuf,
    /// Safetensors file to write
    #[arg(long, value_name = "FILE")]
    out: PathBuf,
    #[command(flatten)]
    place: Where,
    /// Also write the hidden states of every layer and the experts that each router chose
    #[arg(long)]
    hidden: bool,
    /// Refuse to start if more than this is needed, as 8G or 512M [default: what is available]
    #[arg(long, value_name = "SIZE", value_parser = units::parse_bytes)]
    memory_limit: Option<u64>,
}

/// Logits computed at a time: a page of rows, not [B, T, V] at once.
const ROWS: usize = 256;

pub(crate) fn run(arguments: &Arguments) -> Result<(), Failure> {
    arguments.place.run(arguments)
}

impl Task for &Arguments {
    fn on<P: Place>(self, place: P) -> Result<(), Failure> {
        let config = self.source.config()?;
        let ids = InputIds::read(&self.input_ids, &config)?;
        let demand = Demand { cached_tokens: ids.length, logit_rows: ROWS.min(ids.length) };
        memory::check::<P>(&self.source, &config, &demand, self.memory_limit)?;
        let model = self.source.load(&config, place)?;
        // No file is there yet: Ctrl-C may end a pass at once, however long it is.
        let run = |sequence| Pass::run(&model, sequence, self.hidden);
        let passes = ids.sequences().map(run).collect::<Result<Vec<_>, Failure>>()?;
        interrupt::deferred(|| write(&self.out, &model, ids.length, &passes))
    }
}

/// The sequences of the input file, every id below the vocabulary's size.
struct InputIds {
    ids: Vec<u32>,
    length: usize,
}

impl InputIds {
    fn read(path: &Path, config: &Config) -> Result<Self, Failure> {
        let tensor = TensorFile::open(path)?.get("input_ids")?;
        let problem = |problem| Failure::Model(Error::Checkpoint { path: path.to_path_buf(), problem });
        let &[count, length] = tensor.shape() else {
            return Err(problem(format!("input_ids has shape {:?}, expected [sequences, tokens]", tensor.shape())));
        };
        if count == 0 || length == 0 {
            return Err(problem(format!("input_ids has shape [{count}, {length}]: there is no token to run")));
        }
        let most = config.max_position_embeddings;
        if length > most {
            return Err(problem(format!("input_ids has {length} tokens a sequence, but the model ends at {most}")));
        }
        let vocab = config.vocab_size;
        let id = |(index, id): (usize, i64)| {
            u32::try_from(id).ok().filter(|&id| (id as usize) < vocab).ok_or_else(|| {
                let place = format!("[{}, {}]", index / length, index % length);
                problem(format!("input_ids{place} is {id}, but the vocabulary ends at {}", vocab - 1))
            })
        };
        let ids = tensor.to_i64()?.into_iter().enumerate().map(id).collect::<Result<_, _>>()?;
        Ok(Self { ids, length })
    }

    fn sequences(&self) -> impl Iterator<Item = &[u32]> {
        self.ids.chunks(self.length)
    }
}

/// What one sequence gave.
struct Pass<B: Backend> {
    /// After the final norm, where the logits come from.
    last: B::Hidden,
    seen: Capture,
}

impl<B: Backend> Pass<B> {
    /// One pass over the whole sequence. Sequences go one by one: each needs its own cache only while it runs.
    fn run(model: &Model<B>, ids: &[u32], hidden: bool) -> Result<Self, Failure> {
        let blocks: Vec<u32> = (0..blocks_for(ids.len()) as u32).collect();
        let mut cache = model.cache(blocks.len())?;
        let batch = Batch { ids, segments: &[Segment { blocks: &blocks, position: 0, len: ids.len() }] };
        let mut seen = Capture::default();
        let observer: Option<&mut dyn Observer> = if hidden { Some(&mut seen) } else { None };
        let last = model.forward(&batch, &mut cache, observer)?;
        Ok(Self { last, seen })
    }
}

/// Keeps what the model shows on its way.
#[derive(Default)]
struct Capture {
    /// By index: the values of all tokens.
    hidden: BTreeMap<usize, Vec<f32>>,
    /// By layer: K, and the experts of all tokens, ascending within a token.
    topk: BTreeMap<usize, (usize, Vec<i64>)>,
}

impl Observer for Capture {
    fn hidden(&mut self, index: usize, values: Vec<f32>) {
        self.hidden.insert(index, values);
    }

    fn topk(&mut self, layer: usize, chosen: TopkIds) {
        let mut ids: Vec<i64> = chosen.ids.into_iter().map(i64::from).collect();
        ids.chunks_mut(chosen.topk).for_each(<[i64]>::sort_unstable);
        self.topk.insert(layer, (chosen.topk, ids));
    }
}

/// Which values a tensor of the output holds.
#[derive(Clone, Copy)]
enum Contents {
    Logits,
    Hidden(usize),
    Topk(usize),
}

/// Writes what all sequences gave; logits are computed on the way to the file, a page of rows at a time.
fn write<B: Backend>(out: &Path, model: &Model<B>, length: usize, passes: &[Pass<B>]) -> Result<(), Failure> {
    let (count, config) = (passes.len(), model.config());
    let mut contents = vec![Contents::Logits];
    let mut layouts = vec![layout("logits".to_owned(), Dtype::F32, vec![count, length, config.vocab_size])];
    if let Some(Pass { seen, .. }) = passes.first() {
        for &index in seen.hidden.keys() {
            contents.push(Contents::Hidden(index));
            layouts.push(layout(format!("hidden.{index}"), Dtype::F32, vec![count, length, config.hidden_size]));
        }
        for (&layer, &(topk, _)) in &seen.topk {
            contents.push(Contents::Topk(layer));
            layouts.push(layout(format!("topk.{layer}"), Dtype::I64, vec![count * length, topk]));
        }
    }
    let fill = |index: usize, file: &mut TensorWriter<'_>| -> Result<(), Error> {
        for pass in passes {
            match contents[index] {
                Contents::Logits => write_logits(model, &pass.last, length, file)?,
                Contents::Hidden(index) => file.write(&bytes(&pass.seen.hidden[&index], f32::to_le_bytes))?,
                Contents::Topk(layer) => file.write(&bytes(&pass.seen.topk[&layer].1, i64::to_le_bytes))?,
            }
        }
        Ok(())
    };
    Ok(write_tensor_file(out, &layouts, &[("format", "pt")], fill)?)
}

fn layout(name: String, dtype: Dtype, shape: Vec<usize>) -> TensorLayout<'static> {
    TensorLayout { name: name.into(), dtype, shape: shape.into() }
}

fn write_logits<B: Backend>(
    model: &Model<B>,
    last: &B::Hidden,
    length: usize,
    file: &mut TensorWriter<'_>,
) -> Result<(), Error> {
    let rows: Vec<usize> = (0..length).collect();
    for rows in rows.chunks(ROWS) {
        if interrupt::requested() {
            return Err(Error::Interrupted);
        }
        file.write(&bytes(&model.logits(last, rows)?, f32::to_le_bytes))?;
    }
    Ok(())
}

fn bytes<T: Copy, const N: usize>(values: &[T], little_endian: impl Fn(T) -> [u8; N]) -> Vec<u8> {
    values.iter().flat_map(|&value| little_endian(value)).collect()
}
