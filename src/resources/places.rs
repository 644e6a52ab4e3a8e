use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use super::View;
use crate::{
    catalog::{Changes, Snapshot},
    model::Locality,
};

/// Where the instances of a catalog run, so that places which see the same can be told from those that do not.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Places {
    /// Instances by region.
    regions: BTreeMap<Arc<str>, usize>,
    /// Instances by zone and the region that it is in.
    zones: BTreeMap<Arc<str>, BTreeMap<Arc<str>, usize>>,
}

impl Places {
    /// Takes in `changes`, which lead from `old` to `new`, as far as they concern the view. Costs what the changes touch.
    pub fn follow(&mut self, old: &Snapshot, new: &Snapshot, changes: &Changes, view: &View) {
        let Changes::Touched(touched) = changes else {
            *self = Self::default();
            let services = new.services().filter(|service| view.concerns(&service.id));
            services
                .flat_map(|service| service.instances())
                .for_each(|instance| self.add(&instance.locality));
            return;
        };
        let whole: BTreeSet<_> =
            touched.iter().filter(|(_, id)| id.is_none()).map(|(service, _)| service).collect();
        for (service, id) in touched.iter().filter(|(service, _)| view.concerns(service)) {
            let of = |snapshot: &Snapshot| match (snapshot.service(service), id) {
                (Some(service), None) => service.instances().cloned().collect(),
                (Some(of), Some(id)) if !whole.contains(service) => {
                    of.instance(id).cloned().into_iter().collect()
                }
                _ => Vec::new(),
            };
            of(old).iter().for_each(|instance| self.remove(&instance.locality));
            of(new).iter().for_each(|instance| self.add(&instance.locality));
        }
    }

    /// The widest place from which everything looks as it does from this one: a zone without instances is no other than its
    /// region, and a region without instances could be anywhere.
    pub fn widest(&self, place: &Locality) -> Locality {
        let Locality { region, zone, .. } = place;
        let anywhere = Locality::default();
        let in_zone = self.zones.get(zone).filter(|_| !zone.is_empty()).is_some_and(|regions| {
            region.is_empty() || regions.contains_key("") || regions.contains_key(region)
        });
        if in_zone {
            return Locality { region: Arc::clone(region), zone: Arc::clone(zone), ..anywhere };
        }
        let in_region = !region.is_empty() && self.regions.contains_key(region);
        if in_region { Locality { region: Arc::clone(region), ..anywhere } } else { anywhere }
    }

    fn add(&mut self, place: &Locality) {
        let Locality { region, zone, .. } = place;
        *self.regions.entry(Arc::clone(region)).or_default() += 1;
        let regions = self.zones.entry(Arc::clone(zone)).or_default();
        *regions.entry(Arc::clone(region)).or_default() += 1;
    }

    fn remove(&mut self, place: &Locality) {
        take(&mut self.regions, &place.region);
        if let Some(regions) = self.zones.get_mut(&place.zone) {
            take(regions, &place.region);
            if regions.is_empty() {
                self.zones.remove(&place.zone);
            }
        }
    }
}

fn take(counts: &mut BTreeMap<Arc<str>, usize>, key: &Arc<str>) {
    if let Some(count) = counts.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            counts.remove(key);
        }
    }
}
