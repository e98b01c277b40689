//! A golden layer without what only training reads: two thirds of its bytes are gradients.

/// The tensors of a safetensors file that the forward pass knows: all but the gradients (`dx`, `d_*`, `dloss.*`) and
/// their seed (`dy`). `None` if the bytes are not such a file.
///
/// The header is a flat JSON object of flat objects, as the safetensors library writes it; a full reader is not needed.
pub(crate) fn forward_only(bytes: &[u8]) -> Option<Vec<u8>> {
    let length = usize::try_from(u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?)).ok()?;
    let header = std::str::from_utf8(bytes.get(8..8usize.checked_add(length)?)?).ok()?;
    let data = bytes.get(8 + length..)?;
    let (mut entries, mut kept) = (Vec::new(), Vec::new());
    for (name, value) in entries_of(header)? {
        if name == "__metadata__" {
            entries.push(format!("\"{name}\":{value}"));
        } else if !is_gradient(name) {
            let (before, offsets) = value.split_once("\"data_offsets\":[")?;
            let (offsets, after) = offsets.split_once(']')?;
            let (start, end) = offsets.split_once(',')?;
            let first = kept.len();
            kept.extend_from_slice(data.get(start.trim().parse().ok()?..end.trim().parse().ok()?)?);
            entries.push(format!("\"{name}\":{before}\"data_offsets\":[{first},{}]{after}", kept.len()));
        }
    }
    let mut header = format!("{{{}}}", entries.join(","));
    header.extend(std::iter::repeat_n(' ', header.len().next_multiple_of(8) - header.len()));
    let mut out = (header.len() as u64).to_le_bytes().to_vec();
    out.extend_from_slice(header.as_bytes());
    out.append(&mut kept);
    Some(out)
}

fn is_gradient(name: &str) -> bool {
    matches!(name, "dx" | "dy") || name.starts_with("d_") || name.starts_with("dloss.")
}

/// Names and values of a JSON object whose values are objects without objects in them.
fn entries_of(json: &str) -> Option<Vec<(&str, &str)>> {
    let mut rest = json.trim().strip_prefix('{')?.strip_suffix('}')?;
    let mut entries = Vec::new();
    while !rest.is_empty() {
        let (name, after) = rest.strip_prefix('"')?.split_once("\":")?;
        let end = end_of_object(after)?;
        entries.push((name, &after[..end]));
        rest = after[end..].strip_prefix(',').unwrap_or(&after[end..]);
    }
    Some(entries)
}

/// The index after the object that the text begins with; braces within strings do not count.
fn end_of_object(text: &str) -> Option<usize> {
    let (mut quoted, mut escaped) = (false, false);
    for (at, byte) in text.bytes().enumerate() {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = true,
            b'"' => quoted = !quoted,
            b'}' if !quoted => return Some(at + 1),
            _ => {}
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::forward_only;

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
    }

    #[test]
    fn gradients_stay_behind() {
        let before = concat!(
            r#"{"__metadata__":{"case":"{\"T\": 2}"},"dx":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"#,
            r#""d_w":{"dtype":"U8","shape":[1],"data_offsets":[3,4]},"x":{"dtype":"U8","shape":[2],"data_offsets":[4,6]},"#,
            r#""down":{"dtype":"U8","shape":[1],"data_offsets":[6,7]}}"#
        );
        let after = concat!(
            r#"{"__metadata__":{"case":"{\"T\": 2}"},"x":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},"#,
            r#""down":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}}"#
        );
        let padded = format!("{after:<width$}", width = after.len().next_multiple_of(8));
        assert_eq!(forward_only(&file(before, &[1, 2, 3, 4, 5, 6, 7])), Some(file(&padded, &[5, 6, 7])));
    }

    #[test]
    fn other_bytes_are_refused() {
        assert_eq!(forward_only(b"short"), None);
        assert_eq!(forward_only(&u64::MAX.to_le_bytes()), None);
        assert_eq!(forward_only(&file(r#"{"x":{"dtype":"U8","shape":[2],"data_offsets":[0,9]}}"#, &[1])), None);
        assert_eq!(forward_only(&file(r#"{"x":{"dtype":"U8""#, &[])), None);
    }
}
