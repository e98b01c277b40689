//! The function `strftime_now`: today's date, which some templates put in the system prompt. In UTC.

use std::time::{SystemTime, UNIX_EPOCH};

use minijinja::{Error, ErrorKind};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
const SECONDS_PER_DAY: u64 = 86_400;

/// The present time in Python's `strftime` format.
pub(super) fn strftime_now(format: &str) -> Result<String, Error> {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
    strftime(format, now)
}

/// Seconds since 1970 in Python's `strftime` format; a `-` drops leading zeros.
fn strftime(format: &str, seconds: u64) -> Result<String, Error> {
    let (days, second) = (seconds / SECONDS_PER_DAY, seconds % SECONDS_PER_DAY);
    let (year, month, day) = civil(days);
    let weekday = WEEKDAYS[((days + 4) % 7) as usize];
    let month_name = MONTHS[month as usize - 1];
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let mut out = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            out.push(character);
            continue;
        }
        let mut directive = characters.next();
        let padded = directive != Some('-');
        if !padded {
            directive = characters.next();
        }
        let number = |value: u64| if padded { format!("{value:02}") } else { value.to_string() };
        let text = match directive {
            Some('Y') => year.to_string(),
            Some('y') => number(year % 100),
            Some('m') => number(month),
            Some('d') => number(day),
            Some('e') => format!("{day:2}"),
            Some('B') => month_name.to_owned(),
            Some('b' | 'h') => month_name[..3].to_owned(),
            Some('A') => weekday.to_owned(),
            Some('a') => weekday[..3].to_owned(),
            Some('H') => number(hour),
            Some('I') => number((hour + 11) % 12 + 1),
            Some('M') => number(minute),
            Some('S') => number(second),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('Z') => "UTC".to_owned(),
            Some('z') => "+0000".to_owned(),
            Some('%') => "%".to_owned(),
            other => {
                let directive = other.map_or_else(|| "nothing".to_owned(), String::from);
                let message = format!("strftime_now: % followed by {directive} is not supported in {format:?}");
                return Err(Error::new(ErrorKind::InvalidOperation, message));
            }
        };
        out.push_str(&text);
    }
    Ok(out)
}

/// Year, month and day of a day since 1970 (Gregorian calendar, by its eras of 400 years, years beginning in March).
fn civil(days: u64) -> (u64, u64, u64) {
    let since_era = days + 719_468;
    let (era, day_of_era) = (since_era / 146_097, since_era % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = if march_month < 10 { march_month + 3 } else { march_month - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::strftime;

    #[test]
    fn dates_are_as_python_writes_them() {
        // python3 -c 'import datetime as d; print(d.datetime.fromtimestamp(N, d.UTC).strftime(FORMAT))'
        let cases = [
            (0, "%A %d %b %Y %H:%M:%S", "Thursday 01 Jan 1970 00:00:00"),
            (951_782_399, "%d %B %Y, %I:%M %p", "28 February 2000, 11:59 PM"),
            (951_782_400, "%Y-%m-%d %a", "2000-02-29 Tue"),
            (1_709_210_096, "%-d %b %y %e 100%%", "29 Feb 24 29 100%"),
            (4_107_542_399, "%F %T", "2100-02-28 23:59:59"),
            (4_107_542_400, "%-d/%-m/%Y", "1/3/2100"),
        ];
        for (seconds, format, expected) in cases {
            assert_eq!(strftime(format, seconds).unwrap(), expected);
        }
        let message = strftime("%Q", 0).unwrap_err().to_string();
        assert!(message.contains("% followed by Q is not supported"), "{message}");
        assert!(strftime("%", 0).is_err());
    }
}
