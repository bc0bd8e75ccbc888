//! A page of a list, read object by object.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{DeserializeOwned, DeserializeSeed, IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::value::RawValue;

/// What a list says beside its objects.
#[derive(Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(default, rename_all = "camelCase")]
pub(super) struct ListMeta {
    pub(super) resource_version: String,
    /// Where the next page begins; empty on the last one.
    pub(super) r#continue: String,
}

/// Reads a page and hands over each object, or the bytes of one that does not fit its type.
pub(super) fn read<T: DeserializeOwned>(text: &[u8], take: &mut Take<'_, T>) -> Result<ListMeta, serde_json::Error> {
    let mut deserializer = serde_json::Deserializer::from_slice(text);
    let meta = Page { take }.deserialize(&mut deserializer)?;
    deserializer.end()?;
    Ok(meta)
}

/// Gets each object.
type Take<'t, T> = dyn FnMut(Item<'_, T>) + 't;

/// An object, or the bytes of one that does not fit its type.
type Item<'a, T> = Result<T, (&'a RawValue, serde_json::Error)>;

struct Page<'a, 't, T> {
    take: &'a mut Take<'t, T>,
}

impl<'de, T: DeserializeOwned> DeserializeSeed<'de> for Page<'_, '_, T> {
    type Value = ListMeta;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<ListMeta, D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de, T: DeserializeOwned> Visitor<'de> for Page<'_, '_, T> {
    type Value = ListMeta;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of objects")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<ListMeta, A::Error> {
        let mut meta = ListMeta::default();
        while let Some(key) = map.next_key::<&str>()? {
            match key {
                "metadata" => meta = map.next_value()?,
                "items" => map.next_value_seed(Items::<T> { take: &mut *self.take, of: PhantomData })?,
                _ => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(meta)
    }
}

struct Items<'a, 't, T> {
    take: &'a mut Take<'t, T>,
    of: PhantomData<T>,
}

impl<'de, T: DeserializeOwned> DeserializeSeed<'de> for Items<'_, '_, T> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, T: DeserializeOwned> Visitor<'de> for Items<'_, '_, T> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("objects")
    }

    /// An empty list may be null.
    fn visit_unit<E>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<(), A::Error> {
        while let Some(item) = items.next_element::<&RawValue>()? {
            (self.take)(serde_json::from_str(item.get()).map_err(|error| (item, error)));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use k8s_openapi::api::core::v1::ConfigMap;

    use super::*;

    #[test]
    fn objects_come_one_by_one_and_bad_ones_alone_are_lost() {
        let text = r#"{"kind":"ConfigMapList","apiVersion":"v1","metadata":{"resourceVersion":"12","continue":"c","remainingItemCount":3},
            "items":[{"metadata":{"name":"a"}},{"metadata":{"name":"b"},"data":1},{"metadata":{"name":"c"}}]}"#;
        let (mut names, mut bad) = (Vec::new(), Vec::new());
        let meta = read::<ConfigMap>(text.as_bytes(), &mut |item| match item {
            Ok(map) => names.push(map.metadata.name.unwrap()),
            Err((raw, _)) => bad.push(raw.get().to_owned()),
        });
        assert_eq!(meta.unwrap(), ListMeta { resource_version: "12".into(), r#continue: "c".into() });
        assert_eq!(names, ["a", "c"]);
        assert_eq!(bad, [r#"{"metadata":{"name":"b"},"data":1}"#]);
        let empty =
            read::<ConfigMap>(br#"{"items":null,"metadata":{"resourceVersion":"3"}}"#, &mut |_| panic!("an item"));
        assert_eq!(empty.unwrap().resource_version, "3");
    }
}
