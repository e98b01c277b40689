//! Numbers for people, and tables that line up.

/// `1.5 GiB`; bytes below 1024 as they are.
pub(crate) fn bytes(count: u64) -> String {
    scaled(count as f64, 1024.0, &[" B", " KiB", " MiB", " GiB", " TiB", " PiB"])
}

/// `16.4B`, as parameters are counted.
pub(crate) fn parameters(count: u64) -> String {
    scaled(count as f64, 1000.0, &["", "K", "M", "B", "T"])
}

/// `6.2 GFLOP`.
pub(crate) fn flops(count: f64) -> String {
    scaled(count, 1000.0, &[" FLOP", " KFLOP", " MFLOP", " GFLOP", " TFLOP", " PFLOP", " EFLOP"])
}

fn scaled(count: f64, step: f64, units: &[&str]) -> String {
    let mut value = count;
    let mut unit = 0;
    // 999.95 would print as 1000.0.
    while value >= step - 0.05 && unit + 1 < units.len() {
        value /= step;
        unit += 1;
    }
    if unit == 0 { format!("{value}{}", units[0]) } else { format!("{value:.1}{}", units[unit]) }
}

/// `1,234,567`.
pub(crate) fn grouped(count: u64) -> String {
    let digits = count.to_string();
    let mut out = String::with_capacity(digits.len() * 4 / 3);
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// A size such as `8G`, `512MiB`, `1.5g` or `4096`: powers of 1024, whatever the spelling.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = text.split_at(split);
    let power = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 1,
        "m" | "mb" | "mib" => 2,
        "g" | "gb" | "gib" => 3,
        "t" | "tb" | "tib" => 4,
        _ => return Err("expected a size such as 4096, 512M or 8G".to_owned()),
    };
    let value: f64 = number.parse().map_err(|_| "expected a size such as 4096, 512M or 8G".to_owned())?;
    let size = value * 1024_f64.powi(power);
    if size < 1.0 || size >= u64::MAX as f64 {
        return Err("expected a size between 1 byte and 16 million terabytes".to_owned());
    }
    Ok(size as u64)
}

/// Columns padded to their widest cell, two spaces apart; those named in `right` are flush right. Cells count as wide as
/// their characters.
pub(crate) fn table(rows: &[Vec<String>], right: &[usize]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widest = |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| widest(column).unwrap_or(0)).collect();
    let mut out = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let gap = if column == 0 { "" } else { "  " };
            let width = widths[column];
            let cell = if right.contains(&column) { format!("{cell:>width$}") } else { format!("{cell:<width$}") };
            line.push_str(gap);
            line.push_str(&cell);
        }
        out.push_str(line.trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units() {
        assert_eq!(bytes(0), "0 B");
        assert_eq!(bytes(1023), "1023 B");
        assert_eq!(bytes(1024), "1.0 KiB");
        assert_eq!(bytes(1 << 30), "1.0 GiB");
        assert_eq!(parameters(999), "999");
        assert_eq!(parameters(16_375_728_128), "16.4B");
        assert_eq!(parameters(999_960), "1.0M");
        assert_eq!(flops(6.2e9), "6.2 GFLOP");
        assert_eq!(grouped(0), "0");
        assert_eq!(grouped(999), "999");
        assert_eq!(grouped(16_375_728_128), "16,375,728,128");
    }

    #[test]
    fn sizes() {
        assert_eq!(parse_bytes("4096"), Ok(4096));
        assert_eq!(parse_bytes("8G"), Ok(8 << 30));
        assert_eq!(parse_bytes("1.5 KiB"), Ok(1536));
        for wrong in ["", "G", "-1", "1X", "0", "1e30", "99999999999999T", "1.2.3", "nan"] {
            assert!(parse_bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn tables_line_up() {
        let rows = [vec!["a".into(), "1".into(), "x".into()], vec!["long".into(), "100".into()]];
        assert_eq!(table(&rows, &[1]), "a       1  x\nlong  100\n");
    }
}
