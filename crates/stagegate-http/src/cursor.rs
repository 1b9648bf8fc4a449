//! Cursors of lists: owns their form. A cursor is opaque to callers, carries a version, and is bound to its list, its
//! tenant and its filters, so that a stale or a foreign one is refused instead of answered wrongly.

use stagegate_core::{Code, TenantId};

use crate::problem::Problem;

/// The version of the form.
const PREFIX: &str = "c1";

/// A list that is being paged through: its name, its tenant and its filters.
pub(crate) struct Paging(String);

impl Paging {
    /// `filters` must be the same text for the same filters.
    pub(crate) fn new(list: &str, tenant: &TenantId, filters: &str) -> Self {
        let hash = blake3::hash(format!("{list}\n{tenant}\n{filters}").as_bytes());
        Self(hash.to_hex()[..16].to_owned())
    }

    /// The cursor after the item with this key.
    pub(crate) fn cursor(&self, key: impl std::fmt::Display) -> String {
        format!("{PREFIX}.{}.{key}", self.0)
    }

    /// The key in a cursor of this very list.
    pub(crate) fn read<T: std::str::FromStr>(&self, cursor: Option<&str>) -> Result<Option<T>, Problem> {
        let Some(cursor) = cursor else { return Ok(None) };
        let key = cursor
            .strip_prefix(PREFIX)
            .and_then(|rest| rest.strip_prefix('.'))
            .and_then(|rest| rest.strip_prefix(self.0.as_str()))
            .and_then(|rest| rest.strip_prefix('.'))
            .and_then(|key| key.parse().ok());
        match key {
            Some(key) => Ok(Some(key)),
            None => Err(Problem::new(
                Code::InvalidCursor,
                "The cursor is not one that this list gave for these filters: start again without `cursor`.",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cursor_is_good_for_its_own_list_alone() {
        let tenant = TenantId::default();
        let paging = Paging::new("runs", &tenant, "state=failed");
        let cursor = paging.cursor(7);
        assert_eq!(paging.read::<u32>(Some(&cursor)).expect("own"), Some(7));
        assert_eq!(paging.read::<u32>(None).expect("first page"), None);
        let other = Paging::new("runs", &tenant, "");
        assert!(other.read::<u32>(Some(&cursor)).is_err());
        for garbage in ["", "c1", "c1..7", "c2.x.7", &cursor.replace('7', "x")] {
            assert!(paging.read::<u32>(Some(garbage)).is_err(), "{garbage}");
        }
    }
}
