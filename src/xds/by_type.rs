use super::ResourceType;

/// One for each type, in push order.
#[derive(Debug, Clone, Default)]
pub(super) struct ByType<T>(pub [T; ResourceType::ALL.len()]);

impl<T> ByType<T> {
    pub(super) fn of(&self, kind: ResourceType) -> &T {
        let [cluster, endpoints, lb_endpoint, listener, route, virtual_host] = &self.0;
        match kind {
            ResourceType::Cluster => cluster,
            ResourceType::Endpoints => endpoints,
            ResourceType::LbEndpoint => lb_endpoint,
            ResourceType::Listener => listener,
            ResourceType::Route => route,
            ResourceType::VirtualHost => virtual_host,
        }
    }

    pub(super) fn of_mut(&mut self, kind: ResourceType) -> &mut T {
        let [cluster, endpoints, lb_endpoint, listener, route, virtual_host] = &mut self.0;
        match kind {
            ResourceType::Cluster => cluster,
            ResourceType::Endpoints => endpoints,
            ResourceType::LbEndpoint => lb_endpoint,
            ResourceType::Listener => listener,
            ResourceType::Route => route,
            ResourceType::VirtualHost => virtual_host,
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = &T> {
        self.0.iter()
    }

    pub(super) fn iter_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.0.iter_mut()
    }
}
