use std::{collections::HashSet, sync::Arc};

use crate::{
    catalog::Reader,
    model::Locality,
    resources::{View, names, service_of},
    xds::{Node, Reportable},
};

/// Load reports are about what the catalog holds.
#[derive(Debug)]
pub(super) struct Known(pub(super) Reader);

impl Reportable for Known {
    fn service(&self, name: &str) -> Option<Arc<str>> {
        // Calls to some of the instances of a service count for it.
        service_of(name, &self.0.latest()).map(|service| service.id.shared())
    }

    fn localities(&self, service: &str) -> HashSet<Locality> {
        let snapshot = self.0.latest();
        let service = service.parse().ok().and_then(|id| snapshot.service(&id));
        let instances = service.into_iter().flat_map(|service| service.instances());
        instances.map(|instance| instance.locality.clone()).collect()
    }

    /// All that its view has.
    fn wanted(&self, node: &Node) -> Vec<String> {
        View::of(node).map(|view| names(&self.0.latest(), &view)).unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        catalog::{Change, catalog},
        model::Revision,
    };

    #[test]
    fn clients_are_asked_for_the_services_of_their_view() {
        let (mut writer, reader) = catalog();
        let services = ["a", "b.c", "d"].map(|name| Change::PutService(name.parse().unwrap()));
        writer.apply(Revision(1), services.into());
        let known = Known(reader);
        let node = |upstreams: Option<&str>| Node {
            id: "n".into(),
            metadata: upstreams
                .map(|names| ("disco.upstreams".to_owned(), names.into()))
                .into_iter()
                .collect(),
            ..Node::default()
        };
        assert_eq!(known.wanted(&node(None)), ["a", "b.c", "d"]);
        assert_eq!(known.wanted(&node(Some("d, a, later"))), ["a", "d"]);
        assert_eq!(known.service("b.c").as_deref(), Some("b.c"));
        for name in ["later", "disco_servers", ""] {
            assert_eq!(known.service(name), None, "{name}");
        }
    }
}
